// Which clusters an incremental copy leaves out: those without a dirty byte are DONE before it begins.
//
// What the sweep finds DONE it passes over, so the target's clusters stay unallocated there and show what the target
// builds on. A region without a dirty byte counts as a hole, of which nothing below is looked at; any other is swept
// by chunks without asking the source whether it is empty: an empty region that became so is written as zeroes, which
// a region that is not dirty must not be. Main thread, before the workers start.

import { CNT_DONE_BYTES, DONE, REGION_CHUNKED, REGION_HOLE, type SharedState } from "../cow/shared.js";
import { type ExtentMap, ExtentReader } from "../nbd/extent-map.js";

/** What the map does not know is dirty: to copy too much is no harm. */
export function markClean(shared: SharedState, dirty: ExtentMap): void {
  const { sizeBytes, clusterBytes, chunkBytes, chunksPerRegion } = shared.geometry;
  const regionBytes = chunkBytes * chunksPerRegion;
  shared.regionStates.fill(REGION_CHUNKED);
  const reader = new ExtentReader(dirty, true);
  let cleanBytes = 0;
  for (let at = 0; at < sizeBytes;) {
    const { lengthBytes, flag } = reader.extentAt(at, sizeBytes - at);
    const end = at + lengthBytes;
    if (!flag) {
      const firstCluster = Math.ceil(at / clusterBytes);
      const endCluster = wholeUnits(end, clusterBytes, sizeBytes);
      if (endCluster > firstCluster) {
        shared.clusterStates.fill(DONE, firstCluster, endCluster);
        cleanBytes += Math.min(endCluster * clusterBytes, sizeBytes) - firstCluster * clusterBytes;
      }
      const firstRegion = Math.ceil(at / regionBytes);
      const endRegion = wholeUnits(end, regionBytes, sizeBytes);
      if (endRegion > firstRegion) shared.regionStates.fill(REGION_HOLE, firstRegion, endRegion);
    }
    at = end;
  }
  Atomics.add(shared.counters, CNT_DONE_BYTES, BigInt(cleanBytes));
}

/** Units that end at or before `end`; the disk's last one may be short. */
function wholeUnits(end: number, unitBytes: number, sizeBytes: number): number {
  return end === sizeBytes ? Math.ceil(end / unitBytes) : Math.floor(end / unitBytes);
}
