// A live backup into a repository that does not come about harms none, and leaves nothing that shows.
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { ServedRepository } from "../support/repository/served-repository.js";
import { stopAll } from "../support/server.js";

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
