// The memory that a job's workers keep chunks in which the target has no time for yet (cow/read-ahead.ts). Main thread.

import { closeSync } from "node:fs";
import type { ReadAheadDescription } from "../../cow/read-ahead.js";
import { libc } from "../../native/libc.js";
import { type SystemMemory, systemMemory } from "../../native/memory.js";

/** Nobody is promised this memory: others shall find some, too. */
const SHARE_OF_FREE_MEMORY = 0.5;

/** To the jobs of this process together: each would find the same memory free. */
let promisedBytes = 0;

export interface ReadAheadFile {
  readonly description: ReadAheadDescription;
  /** When no worker uses it any more. Its memory is free then. */
  close(): void;
}

/**
 * Null: there is no room for a chunk, or the system has no such files. Nothing takes memory until it is put there.
 * @param reservedBytes what else this job will take of the memory that is free
 */
export function openReadAhead(
  wantedBytes: number,
  chunkBytes: number,
  reservedBytes = 0,
  { availableBytes = Infinity }: Pick<SystemMemory, "availableBytes"> = systemMemory(),
): ReadAheadFile | null {
  const shareBytes = (availableBytes - reservedBytes) * SHARE_OF_FREE_MEMORY - promisedBytes;
  const bytes = Math.max(0, Math.min(wantedBytes, shareBytes));
  const chunkLimit = Math.floor(bytes / chunkBytes);
  if (chunkLimit === 0 || libc === null) return null;
  const fd = libc.createMemoryFile("cowcatcher");
  if (fd < 0) return null;
  const ownBytes = chunkLimit * chunkBytes;
  promisedBytes += ownBytes;
  const close = (): void => {
    closeSync(fd);
    promisedBytes -= ownBytes;
  };
  return { description: { fd, chunkLimit }, close };
}
