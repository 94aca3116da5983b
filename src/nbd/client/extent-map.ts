// What an export's metadata contexts say of all of it, gathered into a table that workers share (block/extent-map.ts), within
// a time limit: the rest is not known then.

import { CowcatcherError } from "../../errors.js";
import { type ExtentMap, ExtentMapBuilder } from "../../block/extent-map.js";
import { MAX_RANGE_BYTES, type NbdClient } from "./client.js";
import { NBD_META_BASE_ALLOCATION, NBD_STATE_ZERO } from "../wire/protocol.js";

/** Of a server's time for all of the map; then the rest is read in vain, which is slower and no worse. */
const MAP_LIMIT_MS = 15_000;
/** QEMU's dirty bitmaps as metadata contexts (docs/interop/nbd.rst): flag 1 is "dirty". */
const DIRTY_BITMAP_PREFIX = "qemu:dirty-bitmap:";
const NBD_STATE_DIRTY = 1;

export function dirtyBitmapContext(bitmap: string): string {
  return `${DIRTY_BITMAP_PREFIX}${bitmap}`;
}

/** What reads as zeroes. Null where the server cannot say. @throws CowcatcherError as NbdClient.blockStatus. */
export async function gatherZeroes(client: NbdClient): Promise<ExtentMap | null> {
  if (!client.contexts.has(NBD_META_BASE_ALLOCATION)) return null;
  try {
    return await gather(client, NBD_META_BASE_ALLOCATION, NBD_STATE_ZERO);
  } catch (error) {
    // A server that offers the context and fails at it: the disk can be read all the same.
    if (error instanceof CowcatcherError && error.code === "IO" && client.failure === undefined) return null;
    throw error;
  }
}

/** What a dirty bitmap of QEMU's calls dirty. @throws CowcatcherError UNSUPPORTED without it, IO, PROTOCOL. */
export function gatherDirty(client: NbdClient, bitmap: string): Promise<ExtentMap> {
  return gather(client, dirtyBitmapContext(bitmap), NBD_STATE_DIRTY);
}

async function gather(client: NbdClient, context: string, mask: number): Promise<ExtentMap> {
  const { sizeBytes } = client;
  const deadlineMs = performance.now() + MAP_LIMIT_MS;
  const map = new ExtentMapBuilder();
  while (map.endBytes < sizeBytes && !map.isFull && performance.now() < deadlineMs) {
    const asked = Math.min(sizeBytes - map.endBytes, MAX_RANGE_BYTES);
    const { lengths, flags } = await client.blockStatus(context, map.endBytes, asked);
    for (let i = 0; i < lengths.length && map.endBytes < sizeBytes && !map.isFull; i++) {
      const end = Math.min(map.endBytes + (lengths[i] ?? 0), sizeBytes);
      map.add(end, ((flags[i] ?? 0) & mask) !== 0);
    }
  }
  return map.finish();
}
