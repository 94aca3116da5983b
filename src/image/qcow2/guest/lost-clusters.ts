// Before an image is written: that its file has not been cut short.
//
// For an image that is only read, each read looks for itself (format/stored.ts). One that is written grows, and what it
// had lost would be inside the file again, as zeroes. So whoever opens it for writing asks first.
//
// The usual answer costs one refcount block: no cluster behind the end of the file is in use. Where one is, it may be a
// leak of a program that was killed (QEMU allocates first and writes then), so the tables are asked, those of snapshots
// too. Only the clusters that a guest's read would fetch count: a table behind the end, a cluster with data, compressed data.
// An external data file is not looked through: its clusters have no refcounts.
// Main thread, while the image is opened.

import { CachedTable } from "../format/cached-table.js";
import { EntryTable } from "../format/entry-table.js";
import { ClusterKind, ClusterRun, type EntryDecoder } from "../format/entry.js";
import type { QcowFile } from "../format/file.js";
import { assertClustersStored, assertStored, compressedBytesStored } from "../format/stored.js";
import type { Refcounts } from "./refcounts.js";

const L1_HIGH_MASK = 0x00ffffff;

export interface L1Place {
  l1TableOffset: number;
  /** Entries. */
  l1Size: number;
}

/** @throws CowcatcherError FORMAT where the file ends before something that a table of `l1Tables` refers to; IO */
export function assertNothingLost(
  file: QcowFile,
  refcounts: Refcounts,
  decoder: EntryDecoder,
  l1Tables: readonly L1Place[],
): void {
  if (!refcounts.hasUsedFrom(Math.ceil(file.endOffset / decoder.clusterSizeBytes))) return;
  for (const { l1TableOffset, l1Size } of l1Tables) {
    const bytes = new Uint8Array(l1Size * 8);
    assertStored(file, "an L1 table", l1TableOffset, bytes.length);
    file.readSync(bytes, 0, bytes.length, l1TableOffset);
    const l1 = EntryTable.fromBytes(bytes, l1TableOffset);
    for (let index = 0; index < l1Size; index++) {
      const offset = l1.offsetAt(index, L1_HIGH_MASK);
      if (offset !== 0) assertTableStored(file, decoder, index, offset);
    }
  }
}

function assertTableStored(file: QcowFile, decoder: EntryDecoder, l1Index: number, offset: number): void {
  const { clusterSizeBytes, entriesPerTable, unitsPerCluster } = decoder;
  const bytes = new Uint8Array(clusterSizeBytes);
  assertStored(file, "an L2 table", offset, bytes.length);
  file.readSync(bytes, 0, bytes.length, offset);
  const { view } = new CachedTable(l1Index, offset, bytes);
  const run = new ClusterRun();
  const unitCount = entriesPerTable * unitsPerCluster;
  for (let unit = 0; unit < unitCount; unit += run.unitCount) {
    decoder.scan(view, unit, unitCount - unit, run);
    if (run.kind === ClusterKind.Normal) {
      const lengthBytes = run.unitCount * (clusterSizeBytes / unitsPerCluster);
      assertClustersStored(file, clusterSizeBytes, run.hostOffset, lengthBytes);
    } else if (run.kind === ClusterKind.Compressed) {
      compressedBytesStored(file, run.hostOffset, run.compressedBytes);
    }
  }
}
