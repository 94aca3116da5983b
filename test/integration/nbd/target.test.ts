// NBD exports of other projects' servers as TARGET, friendly and failing.
import { randomBytes } from "node:crypto";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, describe, expect, it } from "vitest";
import {
  contentOf,
  disk,
  fails,
  file,
  nbdkit,
  qemuNbd,
  sameBytes,
  SIZE,
  succeeds,
} from "../../support/nbd-servers.js";
import { scratchFolder, stopAll } from "../../support/server.js";

const MiB = 1024 * 1024;

afterEach(stopAll);

describe("an export as TARGET", () => {
  it("has the disk afterwards, old data gone, what is behind it untouched", async () => {
    const old = Buffer.alloc(SIZE + MiB, 0xee);
    const path = file(old);
    const target = await qemuNbd(path);
    await succeeds(["backup", "-q", "--verify", file(disk), target.uri]);
    expect(sameBytes(path, Buffer.concat([disk, old.subarray(SIZE)]))).toBe(true);
  });

  it("may lack every optional command, take one client, and have blocks of its own", async () => {
    // The disk ends within a block of the last server's.
    const odd = disk.subarray(0, SIZE - 1000);
    const source = file(odd);
    const stores = [0, 1, 2].map(() => file(Buffer.alloc(SIZE, 0xee)));
    const [first = "", second = "", third = ""] = stores;
    const servers = [
      await nbdkit("--filter=nozero", "--filter=noextents", "--no-sr", "file", first),
      await qemuNbd(second, "--shared=1"),
      await nbdkit(
        "--filter=blocksize-policy",
        "file",
        third,
        "blocksize-minimum=4096",
        "blocksize-preferred=8192",
        "blocksize-maximum=64K",
        "blocksize-error-policy=error",
      ),
    ];
    for (const [index, server] of servers.entries()) {
      await succeeds(["backup", "-q", "-w", "3", source, server.uri]);
      const content = readFileSync(stores[index] ?? "");
      expect(content.subarray(0, odd.length).equals(odd), `server ${index}`).toBe(true);
      expect(content.subarray(odd.length).equals(Buffer.alloc(1000, 0xee)), `tail ${index}`).toBe(true);
    }
  });

  it("gets no zeroes where it has them, and fast ones where it can", async () => {
    const log = join(scratchFolder(), "log");
    const target = await nbdkit("--filter=log", "memory", "6M", `logfile=${log}`);
    const sparse = Buffer.alloc(SIZE);
    randomBytes(4096).copy(sparse, 2 * MiB);
    await succeeds(["backup", "-q", file(sparse), target.uri]);
    expect(readFileSync(log, "utf8")).not.toContain(" Zero ");
    await succeeds(["backup", "-q", file(Buffer.alloc(SIZE)), target.uri]);
    expect(readFileSync(log, "utf8")).toMatch(/ Zero id=.* fast=1/);
    expect((await contentOf(target)).equals(Buffer.alloc(SIZE))).toBe(true);
  });

  it("is refused when it is too small, read-only, or to be qcow2", async () => {
    const source = file(disk);
    const small = await nbdkit("memory", "1M");
    expect(await fails(["backup", source, small.uri])).toContain(
      "the export has 1048576 bytes, the disk 6291456",
    );
    const readOnly = await nbdkit("-r", "memory", "6M");
    expect(await fails(["backup", source, readOnly.uri])).toContain("the export is read-only");
    expect(await fails(["backup", "-O", "qcow2", source, small.uri])).toContain("written as raw");
  });

  it("fails for its errors by name: no space at once, a flush that fails, I/O after retries", async () => {
    const source = file(disk);
    const failWith = async (...error: string[]): Promise<string> => {
      const { uri } = await nbdkit("--filter=error", "memory", "6M", ...error);
      return fails(["backup", "--target-retries", "1", source, uri]);
    };
    expect(await failWith("error-pwrite=ENOSPC", "error-pwrite-rate=100%")).toMatch(
      /cannot write: no space left on the device.* at offset \d+/,
    );
    expect(await failWith("error-pwrite=EIO", "error-pwrite-rate=100%")).toMatch(
      /cannot write: input\/output error.* at offset \d+/,
    );
    const { uri } = await nbdkit(
      ...["eval", "get_size=echo 6291456", "can_write=exit 0", "can_flush=exit 0"],
      ...["pread=head -c $3 /dev/zero", "pwrite=cat >/dev/null", "flush=echo EIO on purpose >&2; exit 1"],
    );
    expect(await fails(["backup", "--target-retries", "1", source, uri])).toContain(
      "cannot flush: input/output error",
    );
  });

  it("is written to through transient errors, delays and in any order", async () => {
    const target = await nbdkit(
      "--filter=error",
      "--filter=delay",
      "memory",
      "6M",
      "error-pwrite=EIO",
      "error-pwrite-rate=20%",
      "delay-write=3ms",
    );
    await succeeds(["backup", "-q", "--target-retries", "100", file(disk), target.uri]);
    expect((await contentOf(target)).equals(disk)).toBe(true);
  });

  it("is restored to", async () => {
    const backup = join(scratchFolder(), "backup.qcow2");
    await succeeds(["backup", "-q", file(disk), backup]);
    const target = await nbdkit("memory", "6M");
    await succeeds(["restore", "-q", backup, target.uri]);
    expect((await contentOf(target)).equals(disk)).toBe(true);
  });
});
