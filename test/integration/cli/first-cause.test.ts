// What fails first is what is shown and what a policy is asked about, not what it led to.
import { writeFileSync } from "node:fs";
import { constants } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { IS_CAMPAIGN } from "../../support/campaign.js";
import { cowcatcherProcess as cowcatcher } from "../../support/cli.js";
import { nbdkit } from "../../support/nbd-servers.js";
import { RawQmp } from "../../support/raw-qmp.js";
import { scratchFolder, Server, stopAll, until } from "../../support/server.js";

const NBDKIT_ABORTED = 128 + constants.signals.SIGABRT;

const ROUNDS = IS_CAMPAIGN ? 12 : 3;

let folder: string;

beforeEach(() => {
  folder = scratchFolder();
  writeFileSync(join(folder, "disk.img"), Buffer.alloc(32 << 20, 7));
});

afterEach(stopAll);

describe("a server that fails many writes at a time", () => {
  it("is told of by one of its errors, never by what another worker gave up with", async () => {
    let told = 0;
    for (let round = 0; told < ROUNDS && round < 2 * ROUNDS; round++) {
      const target = await nbdkit("--filter=error", "memory", "32M", "error-pwrite-rate=50%", "error=EIO");
      const args = ["backup", "--target-retries", "0", "-w", "8", "disk.img", target.uri];
      const { code, stderr } = await cowcatcher(args, { cwd: folder });
      target.process.kill("SIGTERM");
      // nbdkit 1.32 aborts now and then where several connections end at once: such a round tells nothing of ours.
      if ((await target.process.end()).code === NBDKIT_ABORTED) continue;
      expect(stderr).toMatch(/: cannot write.*: input\/output error at offset \d+\n$/);
      expect(code).toBe(1);
      told++;
    }
    expect(told).toBe(ROUNDS);
  });
});

describe("on-target-error enospc", () => {
  async function start(errno: string, policy: string): Promise<RawQmp> {
    const disk = join(folder, "disk.img");
    const env = { COWCATCHER_FAULTS: `target-write:error=${errno},from=1M,to=2M,count=1` };
    const server = await Server.start(folder, [disk], { env });
    const client = await RawQmp.negotiated(server.control);
    const [node] = (await client.ask({ execute: "query-block" })).return as { device: string }[];
    const { error } = await client.ask({
      execute: "drive-backup",
      arguments: {
        "job-id": "j",
        device: node?.device,
        target: join(folder, "copy.img"),
        sync: "full",
        "on-target-error": policy,
        "x-target-retries": 0,
        "auto-dismiss": false,
      },
    });
    expect(error).toBeUndefined();
    return client;
  }

  async function job(client: RawQmp): Promise<Record<string, unknown> | undefined> {
    const { return: jobs } = await client.ask({ execute: "query-block-jobs" });
    return (jobs as Record<string, unknown>[])[0];
  }

  it.each(["enospc", "auto"])(
    "'%s' stops the job where there is no space left, and it can go on",
    async (policy) => {
      const client = await start("ENOSPC", policy);
      await until("the job pauses", async () => (await job(client))?.["status"] === "paused");
      expect(await job(client)).toMatchObject({ "io-status": "nospace" });
      expect((await client.ask({ execute: "job-resume", arguments: { id: "j" } })).return).toEqual({});
      await until("the job ends", async () => (await job(client))?.["status"] === "concluded");
      expect((await job(client))?.["error"]).toBeUndefined();
      expect((await client.ask({ execute: "block-job-dismiss", arguments: { id: "j" } })).return).toEqual({});
      expect((await client.ask({ execute: "block-job-dismiss", arguments: { id: "j" } })).error).toEqual({
        class: "DeviceNotActive",
        desc: "Block job 'j' not found",
      });
      client.close();
    },
  );

  it("reports any other error", async () => {
    const client = await start("EIO", "enospc");
    await until("the job ends", async () => (await job(client))?.["status"] === "concluded");
    expect((await job(client))?.["error"]).toMatch(/cannot write: input\/output error/);
    client.close();
  });
});
