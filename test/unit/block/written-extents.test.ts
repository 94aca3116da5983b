// Which ranges of a file are written, whatever SEEK_DATA says of the others.
import {
  closeSync,
  fsyncSync,
  ftruncateSync,
  mkdtempSync,
  openSync,
  readSync,
  rmSync,
  writeSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { ExtentReader } from "../../../src/block/extent-map.js";
import { writtenExtents } from "../../../src/block/file/written-extents.js";
import { libc } from "../../../src/native/libc.js";
import { LiveFile } from "../../../src/nbd/client/live-file.js";

const CLUSTER = 65_536;
const SIZE = 8 * CLUSTER;

describe.skipIf(libc === null)("writtenExtents", () => {
  const native = libc as NonNullable<typeof libc>;
  let folder = "";
  let fd = -1;

  beforeEach(() => {
    folder = mkdtempSync(join(tmpdir(), "cowcatcher-written-"));
    fd = openSync(join(folder, "disk"), "w+");
    ftruncateSync(fd, SIZE);
  });
  afterEach(() => {
    vi.restoreAllMocks();
    closeSync(fd);
    rmSync(folder, { recursive: true });
  });

  function put(cluster: number): void {
    writeSync(fd, new Uint8Array(CLUSTER).fill(1), 0, CLUSTER, cluster * CLUSTER);
  }

  it("are neither holes nor what was allocated alone, though its zeroes stand in the page cache", ({
    skip,
  }) => {
    put(1);
    if (native.allocate(fd, 3 * CLUSTER, 3 * CLUSTER) < 0) skip();
    put(4);
    fsyncSync(fd);
    const map = writtenExtents(fd, SIZE);
    if (map === null) return skip();
    readSync(fd, new Uint8Array(SIZE), 0, SIZE, 0);
    const reader = new ExtentReader(map, false);
    const flags = Array.from({ length: 8 }, (_, i) => reader.extentAt(i * CLUSTER, CLUSTER).flag);
    expect(flags).toEqual([false, true, false, false, true, false, false, false]);
    const live = new LiveFile({ fd, oldDataFd: null, written: map });
    const isRead = (from: number, to: number): boolean =>
      live.read(new Uint8Array(SIZE), 0, (to - from) * CLUSTER, from * CLUSTER);
    expect([isRead(1, 2), isRead(4, 5)]).toEqual([true, true]);
    expect([isRead(0, 1), isRead(3, 4), isRead(4, 6), isRead(1, 5)]).toEqual([false, false, false, false]);
  });

  it("are unknown where the file system does not tell", () => {
    vi.spyOn(native, "extentMap").mockReturnValue(-95);
    expect(writtenExtents(fd, SIZE)).toBeNull();
  });
});
