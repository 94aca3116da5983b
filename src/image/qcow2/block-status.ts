// Block status: the longest run from an offset on that one layer provides in one way, as `qemu-img map` sees it.
//
// Runs are merged across L2 tables. Unallocated ranges take the backing file's answer, one layer deeper; what lies
// beyond the end of a shorter backing file reads as zeroes and counts as in no layer. Main thread only.

import type { BlockDevice, BlockStatus } from "../device.js";
import { ClusterKind, ClusterRun } from "./entry.js";
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
  if (stored <= 0) return own;
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
  const { clusterSizeBytes } = mapping;
  const inCluster = offsetBytes % clusterSizeBytes;
  const hasHost = first.kind === ClusterKind.Normal || first.kind === ClusterKind.ZeroAllocated;
  for (let tables = 1; count < lengthBytes && tables < MAX_TABLES; tables++) {
    const more = scanAt(mapping, offsetBytes + count, lengthBytes - count, next);
    if (more === 0) {
      mapping.takeWait()?.catch(() => undefined); // loads the table for the next question
      break;
    }
    if (next.kind !== first.kind) break;
    if (hasHost && next.hostOffset !== first.hostOffset + inCluster + count) break;
    count += more;
  }
  const status: BlockStatus = {
    lengthBytes: count,
    zero: first.kind !== ClusterKind.Normal && first.kind !== ClusterKind.Compressed,
    data: first.kind === ClusterKind.Normal || first.kind === ClusterKind.Compressed,
    depth: 0,
    present: first.kind !== ClusterKind.Unallocated,
    compressed: first.kind === ClusterKind.Compressed,
  };
  if (hasHost) status.hostOffsetBytes = first.hostOffset + inCluster;
  return status;
}

/** Scans one table from an offset on; bytes of the run, 0 where the table must be loaded first. */
function scanAt(mapping: Mapping, offsetBytes: number, lengthBytes: number, run: ClusterRun): number {
  const { clusterSizeBytes, entriesPerTable, bytesPerTable } = mapping;
  const cluster = Math.floor(offsetBytes / clusterSizeBytes);
  const l1Index = Math.floor(cluster / entriesPerTable);
  const table = mapping.tableFor(l1Index);
  if (table === null) {
    if (mapping.wait !== undefined) return 0;
    run.kind = ClusterKind.Unallocated;
    run.hostOffset = 0;
    let end = l1Index + 1;
    while (end < mapping.l1.length && mapping.l1.offsetAt(end, L1_HIGH_MASK) === 0) end++;
    return Math.min(lengthBytes, end * bytesPerTable - offsetBytes);
  }
  const inCluster = offsetBytes - cluster * clusterSizeBytes;
  const maxClusters = Math.ceil((inCluster + lengthBytes) / clusterSizeBytes);
  const firstIndex = cluster % entriesPerTable;
  mapping.decoder.scan(table.view, firstIndex, maxClusters, run);
  let clusterCount = run.clusterCount;
  if (run.kind === ClusterKind.Compressed) {
    const limit = Math.min(maxClusters, entriesPerTable - firstIndex);
    while (clusterCount < limit) {
      mapping.decoder.scan(table.view, firstIndex + clusterCount, 1, run);
      if (run.kind !== ClusterKind.Compressed) break;
      clusterCount++;
    }
    run.kind = ClusterKind.Compressed;
  }
  return Math.min(lengthBytes, clusterCount * clusterSizeBytes - inCluster);
}
