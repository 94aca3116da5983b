// NBD exports of other projects' servers as images and as SOURCE.
import { join } from "node:path";
import { afterEach, describe, expect, it } from "vitest";
import { COWCATCHER_BIN, cowcatcher, run } from "../../support/cli.js";
import {
  disk,
  fails,
  file,
  lastLine,
  nbdkit,
  qemuNbd,
  sameBytes,
  startServer,
  succeeds,
} from "../../support/nbd-servers.js";
import { scratchFolder, stopAll } from "../../support/server.js";

const MiB = 1024 * 1024;

afterEach(stopAll);

describe("an export as an image", () => {
  it("is described and mapped as by qemu-img, and compared", async () => {
    const path = file(Buffer.alloc(0));
    await run("qemu-img", ["create", "-q", "-f", "raw", path, "6M"]);
    await run("qemu-io", ["-f", "raw", "-c", "write -P 7 1M 2M", path]);
    const { uri } = await qemuNbd(path, "-r");
    const theirs = async (...args: string[]): Promise<string> => (await run("qemu-img", args)).stdout;
    expect(JSON.parse(await succeeds(["map", "--json", uri]))).toEqual(
      JSON.parse(await theirs("map", "--output=json", uri)),
    );
    const info = JSON.parse(await succeeds(["info", "--json", uri])) as Record<string, unknown>;
    // QEMU writes the URI in a form of its own.
    expect({ ...info, filename: "" }).toEqual({
      ...(JSON.parse(await theirs("info", "--output=json", uri)) as object),
      filename: "",
    });
    expect(await succeeds(["compare", "-U", path, uri])).toBe("Images are identical.\n");
    expect((await cowcatcher(["compare", file(disk), uri])).code).toBe(1);
    expect(await fails(["check", uri], 63)).toContain("does not support checks");
    expect(await fails(["info", "-f", "qcow2", uri])).toContain("cannot be read as qcow2");
  });

  it("is served on, and backed up while it is", async () => {
    const path = file(disk);
    const origin = await qemuNbd(path);
    const control = join(scratchFolder(), "ctl");
    const relay = await startServer(
      process.execPath,
      (socket) => [COWCATCHER_BIN, "serve", "--socket", socket, "--control", control, `${origin.uri}=root`],
      { exportName: "root" },
    );
    const written = Buffer.from(disk);
    written.fill(9, 4 * MiB + 100, 4 * MiB + 5000);
    await run("qemu-io", ["-f", "raw", "-c", `write -P 9 ${4 * MiB + 100} 4900`, relay.uri]);
    const target = join(scratchFolder(), "backup.qcow2");
    await succeeds(["backup", "-q", "--control", control, "-O", "qcow2", target]);
    const copy = join(scratchFolder(), "copy.raw");
    await run("qemu-img", ["convert", "-O", "raw", target, copy]);
    expect(sameBytes(copy, written)).toBe(true);
    expect(sameBytes(path, written)).toBe(true);
  });
});

describe("an export as SOURCE", () => {
  it("is copied to raw and qcow2, and only what is data", async () => {
    const { uri } = await qemuNbd(file(disk), "-r");
    const folder = scratchFolder();
    const summary = JSON.parse(await lastLine(["backup", "--json", uri, join(folder, "a.raw")])) as {
      bytes_written: number;
    };
    expect(summary.bytes_written).toBeLessThanOrEqual(5 * MiB);
    expect(sameBytes(join(folder, "a.raw"), disk)).toBe(true);
    await succeeds(["backup", "-q", uri, join(folder, "a.qcow2"), "-O", "qcow2"]);
    expect(await run("qemu-img", ["compare", uri, join(folder, "a.qcow2")])).toMatchObject({ code: 0 });
  });

  it("may take one client at a time, know no metadata contexts, and have blocks", async () => {
    const path = file(disk);
    const servers = [
      await qemuNbd(path, "-r", "--shared=1"),
      await nbdkit("-r", "--no-sr", "file", path),
      await nbdkit("-r", "--filter=noextents", "--filter=noparallel", "file", path),
      await nbdkit(
        "-r",
        "--filter=blocksize-policy",
        "file",
        path,
        "blocksize-minimum=4096",
        "blocksize-preferred=8192",
        "blocksize-maximum=64K",
        "blocksize-error-policy=error",
      ),
    ];
    for (const [index, { uri }] of servers.entries()) {
      const target = join(scratchFolder(), "copy.raw");
      await succeeds(["backup", "-q", uri, target]);
      expect(sameBytes(target, disk), `server ${index}`).toBe(true);
    }
  });

  it("fails with the server's error, its URI and offset; `ignore` goes on with zeroes", async () => {
    const { uri } = await nbdkit(
      "-r",
      "--filter=error",
      "file",
      file(disk),
      "error-pread=EIO",
      "error-pread-rate=100%",
    );
    const target = join(scratchFolder(), "copy.raw");
    expect(await fails(["backup", uri, target])).toMatch(
      /nbd\+unix:.*cannot read: input\/output error.* at offset \d+/,
    );
    expect((await cowcatcher(["backup", "-q", "--on-source-error", "ignore", uri, target])).code).toBe(3);
  });
});
