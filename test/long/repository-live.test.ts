// A live backup into a repository that does not come about harms none, and leaves nothing that shows.
import { readFileSync, statSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { cowcatcher } from "../support/cli.js";
import { makeDisk, noise } from "../support/disks.js";
import { type Fault, FakeS3 } from "../support/repository/fake-s3.js";
import { ServedRepository } from "../support/repository/served-repository.js";
import { Guest, scratchFolder, Server, stopAll } from "../support/server.js";

const MiB = 2 ** 20;

let served: ServedRepository;

beforeEach(async () => {
  served = await ServedRepository.start();
});
afterEach(stopAll);

describe("backup --control --repo", () => {
  it("leaves no half of a backup when a disk is cancelled, the command interrupted, or the server killed", async () => {
    const { t0 } = await served.done();
    await served.write("root", "write -P 3 0 6M");
    await served.write("data", "write -P 3 0 4M");
    const limits = ["--rate-limit", "256K", "--level", "full"];
    const cancelled = served.backup(...limits);
    await cancelled.started();
    expect((await served.server.jobs("cancel", await cancelled.jobId())).code).toBe(0);
    const ended = await cancelled.end();
    expect(ended.code).toBe(1);
    expect([await served.times(), served.locks]).toEqual([[t0], []]);
    const interrupted = served.backup(...limits);
    await interrupted.started();
    interrupted.process.kill("SIGINT");
    const { code, stdout } = await interrupted.end();
    expect(code).toBe(130);
    expect(stdout).toContain("there is no such backup; what was stored is used by the next one");
    expect([await served.times(), served.locks]).toEqual([[t0], []]);
    const orphan = served.backup(...limits);
    await orphan.started();
    served.server.process.kill("SIGKILL");
    await served.server.process.end();
    expect((await orphan.end()).code).toBe(1);
    expect(await served.times()).toEqual([t0]);
    await served.restart();
    expect(await served.done()).toMatchObject({ level: "incremental" });
    await served.expectHolds(`root`, "root.raw");
    expect(await served.times()).toHaveLength(2);
    const wrongKey = await served.server.backup("--repo", served.repo, "--group", "vm").end();
    expect([wrongKey.code, wrongKey.stdout]).toEqual([
      11,
      expect.stringContaining("the repository is encrypted"),
    ]);
  });
});

describe("a live backup into a bucket", () => {
  it("holds up no guest when the server stalls, answers 503 and breaks off, and is its T0", async () => {
    const folder = scratchFolder();
    const at = (name: string): string => join(folder, name);
    const bucket = await FakeS3.listen();
    const { environment: env, address: repo } = bucket;
    try {
      expect((await cowcatcher(["repo", "init", repo, "--chunk-size", "1M"], { env })).code).toBe(0);
      await makeDisk(at("disk.raw"), noise(24 * MiB + 512));
      const server = await Server.start(folder, [at("disk.raw")], { env });
      const guest = await Guest.start("model", 16, [server.uri("disk")]);
      guest.run();
      await guest.progress(200);
      await guest.pause();
      await guest.dump(at("t0.raw"));
      const small = ["--cow-buffer-size", "2M", "--spill-dir", folder, "--rate-limit", "64K"];
      const running = server.backup("--repo", repo, "--group", "vm", ...small);
      await running.started();
      let open = (): void => undefined;
      bucket.gate = new Promise((resolve) => (open = resolve));
      guest.run();
      const { code } = await server.jobs("set-speed", await running.jobId(), "0");
      expect(code).toBe(0);
      const before = bucket.requests.length;
      // Not one request is answered, and the guest overwrites more than the buffer holds.
      await guest.progress(3000);
      expect([bucket.requests.length, running.process.over]).toEqual([before, false]);
      const faults: (Fault | undefined)[] = [
        { kind: "status", status: 503 },
        { kind: "break", when: "before" },
        { kind: "break", when: "after" },
        undefined,
      ];
      let met = 0;
      bucket.faultFor = () => (met < 40 ? faults[met++ % faults.length] : undefined);
      bucket.gate = undefined;
      open();
      await guest.progress(500);
      const summary = await running.succeed();
      expect(met).toBe(40);
      expect(summary).toMatchObject({ level: "full", bytes: statSync(at("disk.raw")).size });
      const [disk] = (summary as unknown as { disks: { captures: number; spilled_bytes: number }[] }).disks;
      expect(disk?.captures).toBeGreaterThan(0);
      expect(disk?.spilled_bytes).toBeGreaterThan(0);
      await guest.pause();
      expect(await guest.verify()).toBe("same");
      const restored = await cowcatcher(["restore", `${repo}::vm`, at("out.raw")], { env });
      expect([restored.stderr, restored.code]).toEqual(["", 0]);
      expect(readFileSync(at("out.raw")).equals(readFileSync(at("t0.raw")))).toBe(true);
      const again = await server.backup("--repo", repo, "--group", "vm").succeed();
      expect(again).toMatchObject({ level: "incremental" });
    } finally {
      await bucket.close();
    }
  });

  it("ends with an error where the server stays away, and the guest goes on", async () => {
    const folder = scratchFolder();
    const disk = join(folder, "disk.raw");
    const bucket = await FakeS3.listen();
    const { environment: env, address: repo } = bucket;
    expect((await cowcatcher(["repo", "init", repo, "--chunk-size", "1M"], { env })).code).toBe(0);
    await makeDisk(disk, noise(12 * MiB));
    const server = await Server.start(folder, [disk], { env });
    const guest = await Guest.start("model", 17, [server.uri("disk")]);
    const limits = ["--rate-limit", "64K", "--target-retries", "0"];
    const running = server.backup("--repo", repo, "--group", "vm", ...limits);
    await running.started();
    guest.run();
    await bucket.close();
    expect((await server.jobs("set-speed", await running.jobId(), "0")).code).toBe(0);
    const { code, stdout } = await running.end(600_000);
    expect(code).toBe(1);
    expect(stdout).toContain("the server cannot be reached");
    await guest.progress(500);
    await guest.pause();
    expect(await guest.verify()).toBe("same");
  });
});
