// Where a file ends, and that it still does not end before the place where it did.
//
// The size of an image is taken when it is opened, and holds from then on. A file that another program cuts short
// afterwards has lost data: what is missing is an error wherever it is met, never zeroes. Three looks at it, as no
// single one sees everything: a read that comes back short; a hole that is said to reach to the end (SEEK_DATA calls
// what lies past the end one); and the length itself, at T0, at flushes and when a copy is done. The last also sees a
// file that was cut and has grown again by one of our own writes, if it is asked for before that write.
// Any thread. Block devices are asked for their size as files are.

import * as fs from "node:fs";
import { CowcatcherError, ioError } from "../../errors.js";
import { libc } from "../../native/libc.js";
import { sizeOf } from "./device-size.js";

/** Length of the file or device in bytes, as it is now. @throws CowcatcherError IO */
export function fileEnd(name: string, fd: number): number {
  // No descriptor's own position is ever used: all reads and writes name their offset.
  const end = libc?.seekEnd(fd) ?? -1;
  if (end >= 0) return end;
  try {
    return sizeOf(name, fd, fs.fstatSync(fd));
  } catch (error) {
    throw ioError("examine", name, error);
  }
}

/**
 * @param wantedOffset where something was looked for, if anything was
 * @throws CowcatcherError IO where the file ends before `expectedEnd`, at which it ended once.
 */
export function assertNotCut(name: string, fd: number, expectedEnd: number, wantedOffset?: number): void {
  const end = fileEnd(name, fd);
  if (end < expectedEnd) throw cutShortError(name, Math.max(end, wantedOffset ?? 0), expectedEnd);
}

/**
 * @param offsetBytes the first byte that was wanted and is not there; undefined: none in particular.
 * @param expectedEnd the length that the file had when it was opened, or has been given since.
 */
export function cutShortError(
  name: string,
  offsetBytes: number | undefined,
  expectedEnd: number,
): CowcatcherError {
  return new CowcatcherError({
    code: "IO",
    object: name,
    problem: `it has become shorter than the ${expectedEnd} bytes that it had`,
    hint: "another program has cut it while it was in use; find out which, and restore what is lost",
    offsetBytes,
    errno: "EIO",
  });
}
