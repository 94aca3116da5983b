// The benchmarks' disks: random data (which nothing can compress or skip), in the page cache.

import { randomFillSync } from "node:crypto";
import { closeSync, ftruncateSync, openSync, writeSync } from "node:fs";
import { ioError } from "../../src/errors.js";
import { MiB } from "../../src/units.js";
import type { DiskFormat } from "./contestant.js";
import { runProgram } from "./children.js";

const PIECE_BYTES = 8 * MiB;

/**
 * Writes a raw image.
 * @param dataShare 1: dense; 0.5: every other 8 MiB is a hole; 0: all hole.
 */
export function makeRawDisk(path: string, sizeBytes: number, dataShare: 0 | 0.5 | 1 = 1): void {
  const piece = Buffer.alloc(PIECE_BYTES);
  const fd = openSync(path, "wx", 0o600);
  try {
    ftruncateSync(fd, sizeBytes);
    if (dataShare === 0) return;
    for (let offset = 0; offset < sizeBytes; offset += PIECE_BYTES) {
      const isSecond = (offset / PIECE_BYTES) % 2 === 1;
      if (isSecond && dataShare === 0.5) continue;
      writeSync(fd, randomFillSync(piece), 0, Math.min(PIECE_BYTES, sizeBytes - offset), offset);
    }
  } catch (cause) {
    throw ioError("make the disk", path, cause);
  } finally {
    closeSync(fd);
  }
}

export async function convertDisk(raw: string, path: string, format: DiskFormat): Promise<void> {
  await runProgram("qemu-img", ["convert", "-f", "raw", "-O", format, raw, path]);
}

/** Takes the file out of the page cache, for which it must be on the disk first. Needs no privilege. */
export async function dropCache(path: string): Promise<void> {
  await runProgram("sync", ["-d", path]);
  await runProgram("dd", [`if=${path}`, "iflag=nocache", "count=0", "status=none"]);
}
