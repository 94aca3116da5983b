// Which clusters an incremental copy leaves out: those without a dirty byte are DONE before it begins.
//
// What the sweep finds DONE it passes over, so the target's clusters stay unallocated there and show what the target
// builds on. A region without a dirty byte counts as a hole, of which nothing below is looked at; any other is swept
// by chunks without asking the source whether it is empty: an empty region that became so is written as zeroes, which
// a region that is not dirty must not be. Main thread, before the workers start.

import {
  CNT_DONE_BYTES,
  DONE,
  PENDING,
  REGION_CHUNKED,
  REGION_HOLE,
  REGION_UNKNOWN,
  type SharedState,
} from "../../cow/shared.js";
import { readChanges } from "../../image/bitmaps.js";
import type { Image } from "../../block/device.js";
import { NbdImage } from "../../nbd/client/device.js";
import { type ExtentMap, ExtentReader } from "../../block/extent-map.js";

/** The run of bytes from offsetBytes on, at most lengthBytes, that are all dirty or all clean. */
export type DirtyRuns = (offsetBytes: number, lengthBytes: number) => { lengthBytes: number; dirty: boolean };

/**
 * What the bitmap calls dirty: an export's own, which was asked for when it was opened and is known after its
 * handOver, or an image's.
 * @throws CowcatcherError as readChanges
 */
export async function dirtyRuns(image: Image, bitmap: string): Promise<DirtyRuns> {
  if (!(image instanceof NbdImage)) {
    const changes = await readChanges(image, bitmap);
    return (offsetBytes, lengthBytes) => changes.run(offsetBytes, lengthBytes);
  }
  // The map comes with the hand-over, which is later: layers above a bitmap are asked through the image's connection.
  let runAt: DirtyRuns | undefined;
  return (offsetBytes, lengthBytes) => {
    runAt ??= runsOfMap(image.dirty ?? { runs: new SharedArrayBuffer(0), runCount: 0 });
    return runAt(offsetBytes, lengthBytes);
  };
}

/** What the map does not know is dirty: to copy too much is no harm. */
export function runsOfMap(map: ExtentMap): DirtyRuns {
  const reader = new ExtentReader(map, true);
  return (offsetBytes, lengthBytes) => {
    const run = reader.extentAt(offsetBytes, lengthBytes);
    return { lengthBytes: run.lengthBytes, dirty: run.flag };
  };
}

/**
 * Before the workers begin. A cluster that has been captured already is copied all the same: it is as at T0, and so is
 * what the copy builds on.
 */
export function markClean(shared: SharedState, runAt: DirtyRuns): void {
  const { sizeBytes, clusterBytes, chunkBytes, chunksPerRegion } = shared.geometry;
  const regionBytes = chunkBytes * chunksPerRegion;
  const { clusterStates, regionStates } = shared;
  const isTouched = regionStates.map((state) => (state === REGION_UNKNOWN ? 0 : 1));
  regionStates.fill(REGION_CHUNKED);
  let cleanBytes = 0;
  for (let at = 0; at < sizeBytes;) {
    const { lengthBytes, dirty } = runAt(at, sizeBytes - at);
    const end = at + lengthBytes;
    if (!dirty) {
      const firstCluster = Math.ceil(at / clusterBytes);
      const endCluster = wholeUnits(end, clusterBytes, sizeBytes);
      for (let cluster = firstCluster; cluster < endCluster; cluster++) {
        if (clusterStates[cluster] !== PENDING) continue;
        clusterStates[cluster] = DONE;
        cleanBytes += Math.min(clusterBytes, sizeBytes - cluster * clusterBytes);
      }
      const firstRegion = Math.ceil(at / regionBytes);
      const endRegion = wholeUnits(end, regionBytes, sizeBytes);
      for (let region = firstRegion; region < endRegion; region++) {
        if (isTouched[region] === 0) regionStates[region] = REGION_HOLE;
      }
    }
    at = end;
  }
  Atomics.add(shared.counters, CNT_DONE_BYTES, BigInt(cleanBytes));
}

/** Units that end at or before `end`; the disk's last one may be short. */
function wholeUnits(end: number, unitBytes: number, sizeBytes: number): number {
  return end === sizeBytes ? Math.ceil(end / unitBytes) : Math.floor(end / unitBytes);
}
