// Block status: the longest run from an offset on that one layer provides in one way, as `qemu-img map` sees it.
//
// Runs are merged across L2 tables. Unallocated ranges take the backing file's answer, one layer deeper; what lies
// beyond the end of a shorter backing file reads as zeroes and counts as in no layer. Main thread only.

import type { BlockDevice, BlockStatus } from "../device.js";
import { ClusterKind, ClusterRun, hasHost } from "./entry.js";
import { L1_HIGH_MASK, type Mapping } from "./mapping.js";

/** Tables looked into for one answer: bounds the work where each holds but part of a long run. */
const MAX_TABLES = 64;

export function blockStatusAt(
  mapping: Mapping,
  backing: BlockDevice | null,
  offsetBytes: number,
  lengthBytes: number,
): BlockStatus | Promise<BlockStatus> {
  const own = ownStatus(mapping, offsetBytes, lengthBytes);
  if (own instanceof Promise)
    return own.then(() => blockStatusAt(mapping, backing, offsetBytes, lengthBytes));
  if (own.present || backing === null) return own;
  const stored = backing.sizeBytes - offsetBytes;
  // The layer below answers for what is beyond its end, and it has no place for that.
  if (stored <= 0) return { ...own, hostOffsetBytes: undefined };
  const below = backing.blockStatus(offsetBytes, Math.min(own.lengthBytes, stored));
  return below instanceof Promise ? below.then(deeper) : deeper(below);
}

function deeper(status: BlockStatus): BlockStatus {
  // What no layer has is the image's own, as in qemu-img map.
  return { ...status, depth: status.present ? status.depth + 1 : 0 };
}

/** The status by this layer alone, or a promise after which to ask again. */
function ownStatus(mapping: Mapping, offsetBytes: number, lengthBytes: number): BlockStatus | Promise<void> {
  const first = new ClusterRun();
  let count = scanAt(mapping, offsetBytes, lengthBytes, first);
  if (count === 0) return mapping.takeWait() ?? Promise.resolve();
  const next = new ClusterRun();
  const inUnit = offsetBytes % mapping.unitSizeBytes;
  const isHosted = hasHost(first.kind);
  for (let tables = 1; count < lengthBytes && tables < MAX_TABLES; tables++) {
    const more = scanAt(mapping, offsetBytes + count, lengthBytes - count, next);
    if (more === 0) {
      mapping.takeWait()?.catch(() => undefined); // loads the table for the next question
      break;
    }
    if (next.kind !== first.kind) break;
    if (isHosted && next.hostOffset !== first.hostOffset + inUnit + count) break;
    count += more;
  }
  const status: BlockStatus = {
    lengthBytes: count,
    zero: first.kind !== ClusterKind.Normal && first.kind !== ClusterKind.Compressed,
    data: first.kind === ClusterKind.Normal || first.kind === ClusterKind.Compressed,
    depth: 0,
    present: first.kind !== ClusterKind.Unallocated && first.kind !== ClusterKind.UnallocatedHosted,
    compressed: first.kind === ClusterKind.Compressed,
  };
  if (isHosted) status.hostOffsetBytes = first.hostOffset + inUnit;
  return status;
}

/** Scans one table from an offset on; bytes of the run, 0 where the table must be loaded first. */
function scanAt(mapping: Mapping, offsetBytes: number, lengthBytes: number, run: ClusterRun): number {
  const { unitSizeBytes, unitsPerTable, bytesPerTable } = mapping;
  const unit = Math.floor(offsetBytes / unitSizeBytes);
  const l1Index = Math.floor(unit / unitsPerTable);
  const table = mapping.tableFor(l1Index);
  if (table === null) {
    if (mapping.wait !== undefined) return 0;
    run.kind = ClusterKind.Unallocated;
    run.hostOffset = 0;
    let end = l1Index + 1;
    while (end < mapping.l1.length && mapping.l1.offsetAt(end, L1_HIGH_MASK) === 0) end++;
    return Math.min(lengthBytes, end * bytesPerTable - offsetBytes);
  }
  const inUnit = offsetBytes - unit * unitSizeBytes;
  const maxUnits = Math.ceil((inUnit + lengthBytes) / unitSizeBytes);
  const firstIndex = unit - l1Index * unitsPerTable;
  mapping.decoder.scan(table.view, firstIndex, maxUnits, run);
  let unitCount = run.unitCount;
  if (run.kind === ClusterKind.Compressed) {
    const limit = Math.min(maxUnits, unitsPerTable - firstIndex);
    while (unitCount < limit) {
      mapping.decoder.scan(table.view, firstIndex + unitCount, limit - unitCount, run);
      if (run.kind !== ClusterKind.Compressed) break;
      unitCount += run.unitCount;
    }
    run.kind = ClusterKind.Compressed;
  }
  return Math.min(lengthBytes, unitCount * unitSizeBytes - inUnit);
}
