// `serve --bitmap`: the same answers as qemu-nbd -B, to qemu-img and to nbdinfo; bitmaps that lie are refused.
import { spawnSync } from "node:child_process";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { COWCATCHER_BIN, run } from "../../support/cli.js";
import { startServer } from "../../support/nbd-servers.js";
import { mustRun, scratchFolder, Server, stopAll } from "../../support/server.js";

let folder: string;
let image: string;
let served: Server;
let qemuSocket: string;

async function makeImage(path: string): Promise<void> {
  await mustRun("qemu-img", "create", "-q", "-f", "qcow2", path, "64M");
  await mustRun("qemu-io", "-c", "write 0 1M", path);
  await mustRun("qemu-img", "bitmap", "--add", path, "fine", "-g", "4k");
  await mustRun("qemu-img", "bitmap", "--add", path, "coarse", "-g", "1M");
  await mustRun(
    "qemu-io",
    ...["-c", "write 3M 64k", "-c", "write 3333k 1k", "-c", "write 10M 5M", "-c", "write -z 32M 8k"],
    ...["-c", "discard 50M 1M", "-c", "write 63M 1M", path],
  );
}

beforeAll(async () => {
  folder = scratchFolder();
  image = join(folder, "disk.qcow2");
  await makeImage(image);
  const bitmaps = ["-B", "fine", "-B", "coarse"];
  const qemuArgs = (socket: string): string[] => [
    ...["-r", "-t", "-e", "9", "-x", "disk", ...bitmaps, "-k", socket],
    image,
  ];
  qemuSocket = (await startServer("qemu-nbd", qemuArgs, { exportName: "disk" })).socket;
  const args = ["--read-only", "--bitmap", "fine", "--bitmap", "coarse"];
  served = await Server.start(folder, [image], { args });
});
afterAll(stopAll);

const qemuUri = (): string => `nbd+unix:///disk?socket=${qemuSocket}`;

describe("as qemu-nbd -B", () => {
  test.each(["fine", "coarse"])("qemu-img map of bitmap '%s'", async (name) => {
    const map = (socket: string): Promise<string> => {
      const options = `driver=nbd,path=${socket},export=disk,x-dirty-bitmap=qemu:dirty-bitmap:${name}`;
      return mustRun("qemu-img", "map", "--output=json", "--image-opts", options);
    };
    const [ours, theirs] = [await map(served.socket), await map(qemuSocket)];
    expect(JSON.parse(ours)).toEqual(JSON.parse(theirs));
    expect((JSON.parse(ours) as unknown[]).length).toBeGreaterThan(4);
  });

  test("nbdinfo --map, and the list of contexts", async () => {
    for (const context of ["qemu:dirty-bitmap:fine", "qemu:dirty-bitmap:coarse"]) {
      const [ours, theirs] = [served.uri(), qemuUri()].map((uri) =>
        mustRun("nbdinfo", `--map=${context}`, uri),
      );
      expect(await ours).toBe(await theirs);
      expect(await ours).toContain("dirty");
    }
    const json = JSON.parse(await mustRun("nbdinfo", "--json", served.uri())) as {
      exports: { contexts: string[] }[];
    };
    expect(json.exports[0]?.contexts).toEqual([
      "base:allocation",
      "qemu:dirty-bitmap:fine",
      "qemu:dirty-bitmap:coarse",
    ]);
  });
});

describe("refused", () => {
  const serve = (path: string, ...args: string[]) =>
    run(process.execPath, [COWCATCHER_BIN, "serve", "--socket", join(folder, "no.sock"), path, ...args]);

  test("of a disk that a guest may write, or that is not there", async () => {
    const writable = await serve(image, "--bitmap", "fine");
    expect(writable).toMatchObject({
      code: 2,
      stderr: expect.stringContaining("--bitmap: needs --read-only") as string,
    });
    const missing = await serve(image, "--read-only", "--bitmap", "nope");
    expect(missing).toMatchObject({
      code: 1,
      stderr: expect.stringContaining("has no bitmap 'nope'") as string,
    });
  });

  test("one that was not saved", async () => {
    const crashed = join(folder, "crashed.qcow2");
    await makeImage(crashed);
    // The command ends its process as a crash would.
    spawnSync("qemu-io", ["-c", "write 0 64k", "-c", "abort", crashed], { stdio: "ignore" });
    const { code, stderr } = await serve(crashed, "--read-only", "--bitmap", "fine");
    expect([code, stderr]).toEqual([1, expect.stringContaining("bitmap 'fine' was not saved")]);
  });

  test("one that is out of date, as someone wrote without it", async () => {
    const rewritten = join(folder, "rewritten.qcow2");
    await makeImage(rewritten);
    const other = scratchFolder();
    const writer = await Server.start(other, [rewritten]);
    await mustRun("qemu-io", "-f", "raw", "-c", "write 0 64k", writer.uri());
    await writer.stop();
    const { code, stderr } = await serve(rewritten, "--read-only", "--bitmap", "fine");
    expect([code, stderr]).toEqual([1, expect.stringContaining("bitmap 'fine' is out of date")]);
  });
});
