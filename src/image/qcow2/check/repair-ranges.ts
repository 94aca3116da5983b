// Where an image's metadata stands, by its header and tables: a repair changes an entry in place only where nothing
// else is. An L2 table that overlaps the L1 table, say, cannot be corrected without harm to that table.
//
// L2 tables and data clusters are not looked at: what a repair changes of an L2 table means the same to all that
// share it. Built when it is first asked for, as most repairs need it not at all; for one phase of a repair.

import { type CheckState, offsetOf } from "./state.js";
import type { SnapshotTable } from "../format/snapshots.js";

interface Range {
  what: string;
  offsetBytes: number;
  endBytes: number;
}

export class MetadataRanges {
  private ranges: Range[] | null = null;
  private blocks: Set<number> | null = null;

  constructor(
    private readonly state: CheckState,
    private readonly snapshots: SnapshotTable,
  ) {}

  /** What [offsetBytes, +lengthBytes) overlaps, but for `ignored`; null if nothing. */
  overlapOf(offsetBytes: number, lengthBytes: number, ignored = ""): string | null {
    this.ranges ??= this.tables();
    this.blocks ??= this.refcountBlocks();
    const end = offsetBytes + lengthBytes;
    for (const { what, offsetBytes: start, endBytes } of this.ranges) {
      if (what !== ignored && offsetBytes < endBytes && start < end) return what;
    }
    const { clusterSizeBytes } = this.state;
    for (let at = Math.floor(offsetBytes / clusterSizeBytes); at * clusterSizeBytes < end; at++) {
      if (this.blocks.has(at)) return "refcount block";
    }
    return null;
  }

  private tables(): Range[] {
    const { header, clusterSizeBytes } = this.state;
    const ranges: Range[] = [];
    const add = (what: string, offsetBytes: number, lengthBytes: number): void => {
      if (lengthBytes > 0) ranges.push({ what, offsetBytes, endBytes: offsetBytes + lengthBytes });
    };
    add("qcow2 header", 0, clusterSizeBytes);
    add("active L1 table", header.l1TableOffset, header.l1Size * 8);
    add("refcount table", header.refcountTableOffset, header.refcountTableClusters * clusterSizeBytes);
    add("snapshot table", header.snapshotsOffset, this.snapshots.lengthBytes);
    for (const { l1TableOffset, l1Size } of this.snapshots.entries) {
      add("inactive L1 table", l1TableOffset, l1Size * 8);
    }
    if (header.bitmaps !== null && (header.autoclearFeatures & 1n) !== 0n) {
      add("bitmap directory", header.bitmaps.directoryOffset, header.bitmaps.directoryBytes);
    }
    return ranges;
  }

  /** Clusters of the refcount blocks. */
  private refcountBlocks(): Set<number> {
    const { header, clusterSizeBytes } = this.state;
    const table = this.state.readNow(
      header.refcountTableOffset,
      header.refcountTableClusters * clusterSizeBytes,
    );
    const clusters = new Set<number>();
    for (let at = 0; at < table.byteLength; at += 8) {
      const offset = offsetOf(table.getUint32(at), table.getUint32(at + 4));
      if (offset !== 0) clusters.add(Math.floor(offset / clusterSizeBytes));
    }
    return clusters;
  }
}
