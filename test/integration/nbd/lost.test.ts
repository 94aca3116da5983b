// NBD connections that are lost in the middle of a copy.
import { rmSync } from "node:fs";
import { join } from "node:path";
import { afterEach, describe, expect, it } from "vitest";
import {
  diskBytes,
  file,
  hasBegun,
  nbdkit,
  qemuNbd,
  sameBytes,
  startBackup,
  startServer,
  type RunningServer,
} from "../../support/nbd-servers.js";
import { scratchFolder, stopAll } from "../../support/server.js";

const MiB = 1024 * 1024;

afterEach(stopAll);

describe("a lost connection", () => {
  const big = diskBytes(24 * MiB);
  /** For what the loss must end: at this rate the copy is far from its end when the server is gone. */
  const SLOW = "1M";

  /** Runs `args` and kills and restarts the server as soon as bytes have come or gone. */
  async function withRestart(
    server: RunningServer,
    restart: () => Promise<unknown>,
    args: string[],
    rateLimit = "12M",
  ) {
    const options = ["--json", "-p", "--rate-limit", rateLimit, "--target-retries", "20"];
    const backup = startBackup([...args, ...options]);
    await hasBegun(backup);
    await kill(server);
    await restart();
    return backup.ended;
  }

  async function kill({ process, socket }: RunningServer): Promise<void> {
    process.kill("SIGKILL");
    await process.ended;
    rmSync(socket, { force: true });
  }

  it("is made again, of the target and of the source", async () => {
    const path = file(Buffer.alloc(big.length));
    const target = await qemuNbd(path);
    const again = (image: string, socket: string) => () =>
      startServer("qemu-nbd", (at) => ["-t", "--shared=8", "-f", "raw", "-k", at, image], { socket });
    const written = await withRestart(target, again(path, target.socket), ["backup", file(big), target.uri]);
    expect(written).toMatchObject({ code: 0, stderr: "" });
    expect(sameBytes(path, big)).toBe(true);

    const origin = file(big);
    const source = await qemuNbd(origin);
    const copy = join(scratchFolder(), "copy.raw");
    const read = await withRestart(source, again(origin, source.socket), ["backup", source.uri, copy]);
    expect(read).toMatchObject({ code: 0, stderr: "" });
    expect(sameBytes(copy, big)).toBe(true);
  });

  it("is an error when another disk comes back, or nothing does", async () => {
    const target = await nbdkit("memory", "24M");
    const other = () =>
      startServer("nbdkit", (socket) => ["-f", "-U", socket, "memory", "25M"], { socket: target.socket });
    const wrong = await withRestart(target, other, ["backup", file(big), target.uri], SLOW);
    expect(wrong.code).toBe(1);
    expect(wrong.stderr + wrong.stdout).toContain("the export has 26214400 bytes instead of 25165824");

    const gone = await nbdkit("memory", "24M");
    const backup = startBackup([
      "backup",
      "--json",
      "-p",
      "--rate-limit",
      SLOW,
      "--target-retries",
      "1",
      file(big),
      gone.uri,
    ]);
    await hasBegun(backup);
    await kill(gone);
    expect((await backup.ended).code).toBe(1);
  });

  it.each([
    ["is gone", "SIGKILL"],
    ["is silent", "SIGSTOP"],
  ] as const)("does not hold a cancelled backup whose server %s", async (_name, signal) => {
    const target = await nbdkit("memory", "24M");
    const args = ["--json", "-p", "--rate-limit", SLOW, "--target-retries", "1000"];
    const backup = startBackup(["backup", ...args, file(big), target.uri]);
    await hasBegun(backup);
    target.process.kill(signal);
    if (signal === "SIGKILL") await target.process.ended;
    const start = performance.now();
    backup.kill("SIGINT");
    expect((await backup.ended).code).toBe(130);
    // A silent server is waited for two minutes, and one that is gone is looked for longer.
    expect(performance.now() - start).toBeLessThan(30_000);
  });
});
