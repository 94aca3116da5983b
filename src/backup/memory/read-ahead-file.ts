// The memory that a job's workers keep chunks in which the target has no time for yet (cow/read-ahead.ts). Main thread.

import { closeSync } from "node:fs";
import type { ReadAheadDescription } from "../../cow/read-ahead.js";
import { libc } from "../../native/libc.js";
import { systemMemory } from "../../native/memory.js";

/** Nobody is promised this memory: others shall find some, too. */
const SHARE_OF_FREE_MEMORY = 0.5;

export interface ReadAheadFile {
  readonly description: ReadAheadDescription;
  /** When no worker uses it any more. Its memory is free then. */
  close(): void;
}

/** Null: there is no room for a chunk, or the system has no such files. Nothing takes memory until it is put there. */
export function openReadAhead(wantedBytes: number, chunkBytes: number): ReadAheadFile | null {
  const { availableBytes = Infinity } = systemMemory();
  const bytes = Math.min(wantedBytes, availableBytes * SHARE_OF_FREE_MEMORY);
  const chunkLimit = Math.floor(bytes / chunkBytes);
  if (chunkLimit === 0 || libc === null) return null;
  const fd = libc.createMemoryFile("cowcatcher");
  if (fd < 0) return null;
  return { description: { fd, chunkLimit }, close: () => closeSync(fd) };
}
