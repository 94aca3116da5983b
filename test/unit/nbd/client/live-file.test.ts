// What is read past a server: the live file, and over it what was kept of T0.
import { closeSync, ftruncateSync, mkdtempSync, openSync, rmSync, writeSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { libc } from "../../../../src/native/libc.js";
import { LiveFile } from "../../../../src/nbd/client/live-file.js";

const CLUSTER = 65_536;
const COUNT = 4;

describe.skipIf(libc === null)("LiveFile", () => {
  let folder = "";
  let live = -1;
  let old = -1;

  beforeEach(() => {
    folder = mkdtempSync(join(tmpdir(), "cowcatcher-live-"));
    live = openSync(join(folder, "live"), "w+");
    old = openSync(join(folder, "old"), "w+");
    for (let i = 0; i < COUNT; i++) put(live, i, 1 + i);
    ftruncateSync(old, COUNT * CLUSTER);
  });
  afterEach(() => {
    vi.restoreAllMocks();
    closeSync(live);
    closeSync(old);
    rmSync(folder, { recursive: true });
  });

  function put(fd: number, cluster: number, value: number): void {
    writeSync(fd, new Uint8Array(CLUSTER).fill(value), 0, CLUSTER, cluster * CLUSTER);
  }

  function read(from = 0, to = COUNT * CLUSTER, oldDataFd: number | null = old): number[] | false {
    const buffer = new Uint8Array(to - from + 16);
    if (!new LiveFile({ fd: live, oldDataFd }).read(buffer, 16, to - from, from)) return false;
    const values: number[] = [];
    for (let at = 16; at < buffer.length; at += CLUSTER) values.push(buffer[at] ?? -1);
    return values;
  }

  it("shows the live bytes where nothing was kept, and else what was kept", () => {
    expect(read()).toEqual([1, 2, 3, 4]);
    put(old, 1, 21);
    put(old, 3, 41);
    expect(read()).toEqual([1, 21, 3, 41]);
    expect(read(CLUSTER + 512, 2 * CLUSTER)).toEqual([21]);
    expect(read(0, COUNT * CLUSTER, null)).toEqual([1, 2, 3, 4]);
  });

  it("takes a write of the guest's that comes in the middle of the read for what it is", () => {
    const native = libc as NonNullable<typeof libc>;
    const pread = native.pread.bind(native);
    vi.spyOn(native, "pread").mockImplementationOnce((...args) => {
      // Kept first, then overwritten: what is read is new.
      put(old, 2, 3);
      put(live, 2, 99);
      return pread(...args);
    });
    expect(read()).toEqual([1, 2, 3, 4]);
  });

  it("knows nothing where the file ends early, or data is let go of meanwhile", () => {
    expect(read(0, (COUNT + 1) * CLUSTER)).toBe(false);
    put(old, 1, 2);
    vi.spyOn(libc as NonNullable<typeof libc>, "seekHole").mockReturnValueOnce(CLUSTER);
    expect(read()).toBe(false);
  });
});
