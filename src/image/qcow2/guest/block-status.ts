// Block status: the longest run from an offset on that one layer provides in one way, as `qemu-img map` sees it.
//
// Runs are merged across L2 tables. Unallocated ranges take the backing file's answer, one layer deeper; what lies
// beyond the end of a shorter backing file reads as zeroes and counts as in no layer. Disks are counted in sectors: a
// raw backing file that ends within one provides the rest of it, as zeroes.
//
// Of an image whose metadata was preallocated (preallocation.ts) the tables alone would call all of the disk data. The
// file system knows better, so data is looked for holes there: they are shown as data that is zero, as QEMU does it.
// Whether the image is of that kind is found out when the first data is met, once.
//
// Main thread only.

import type { BlockStatus, Image } from "../../../block/device.js";
import { FileExtents } from "../../../block/file/fileio.js";
import { endOfLastSector, lastSectorStatus } from "../../last-sector.js";
import { ClusterKind, ClusterRun, hasHost } from "../format/entry.js";
import type { QcowFile } from "../format/file.js";
import type { Qcow2Header } from "../format/header.js";
import { L1_HIGH_MASK, type Mapping } from "./mapping.js";
import { isMetadataPreallocated } from "./preallocation.js";

/** Tables looked into for one answer: bounds the work where each holds but part of a long run. */
const MAX_TABLES = 64;
/** Entries looked at for one answer: a guest's requests wait meanwhile, and a table may have 262,144. */
const MAX_UNITS = 2 ** 15;

export type BackingLayer = Pick<Image, "sizeBytes" | "blockStatus" | "files">;

export class BlockStatusQuery {
  /** Undefined until it is known; null where the tables say all that there is to say. */
  private holes: FileExtents | null | undefined;
  private detection: Promise<void> | undefined;

  constructor(
    private readonly header: Qcow2Header,
    private readonly file: QcowFile,
    private readonly dataFile: QcowFile,
    private readonly mapping: Mapping,
    private readonly backing: BackingLayer | null,
  ) {}

  /** @throws CowcatcherError FORMAT or IO, or rejects with it. */
  statusAt(offsetBytes: number, lengthBytes: number): BlockStatus | Promise<BlockStatus> {
    // Where holes are looked for, the run is looked for in the file system's extent alone: else each of many small
    // extents would cost a scan of the long run.
    const first = ownStatus(this.mapping, offsetBytes, this.holes ? 1 : lengthBytes);
    if (first instanceof Promise) return first.then(() => this.statusAt(offsetBytes, lengthBytes));
    const isPlaced = first.data && first.hostOffsetBytes !== undefined;
    if (this.holes === null || (this.holes === undefined && !isPlaced)) {
      return this.throughLayers(first, offsetBytes);
    }
    if (this.holes === undefined) {
      this.detection ??= this.detect();
      return this.detection.then(() => this.statusAt(offsetBytes, lengthBytes));
    }
    if (!isPlaced) return this.statusWithin(offsetBytes, lengthBytes, false);
    const extent = this.holes.extentAt(first.hostOffsetBytes ?? 0, lengthBytes);
    return this.statusWithin(offsetBytes, extent.lengthBytes, extent.zero);
  }

  /** `isHole`: the range is data of which nothing is stored. */
  private statusWithin(
    offsetBytes: number,
    lengthBytes: number,
    isHole: boolean,
  ): BlockStatus | Promise<BlockStatus> {
    const own = ownStatus(this.mapping, offsetBytes, lengthBytes);
    if (own instanceof Promise) return own.then(() => this.statusAt(offsetBytes, lengthBytes));
    return this.throughLayers(isHole ? { ...own, zero: true } : own, offsetBytes);
  }

  private throughLayers(own: BlockStatus, offsetBytes: number): BlockStatus | Promise<BlockStatus> {
    return own.present || this.backing === null ? own : statusBelow(this.backing, own, offsetBytes);
  }

  private async detect(): Promise<void> {
    const table = this.mapping.refcounts.table;
    const isPreallocated = await isMetadataPreallocated(this.header, table, this.file);
    this.holes = isPreallocated ? new FileExtents(this.dataFile.fd) : null;
  }
}

/** Of a range that this layer does not have. */
function statusBelow(
  backing: BackingLayer,
  own: BlockStatus,
  offsetBytes: number,
): BlockStatus | Promise<BlockStatus> {
  const stored = backing.sizeBytes - offsetBytes;
  if (stored > 0) {
    const below = backing.blockStatus(offsetBytes, Math.min(own.lengthBytes, stored));
    return below instanceof Promise ? below.then(deeper) : deeper(below);
  }
  if (endOfLastSector(backing) <= offsetBytes) return own;
  return deeper(lastSectorStatus(backing, offsetBytes, own.lengthBytes));
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
  const limit = Math.min(lengthBytes, MAX_UNITS * mapping.unitSizeBytes);
  for (let tables = 1; count < limit && tables < MAX_TABLES; tables++) {
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
  const maxUnits = Math.min(MAX_UNITS, Math.ceil((inUnit + lengthBytes) / unitSizeBytes));
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
