// Guest reads: from clusters of every kind, in as few system calls as the layout allows.
//
// A step (range-walk.ts) serves one run of like units (format/entry.ts).
//
// Main thread only.

import type { BlockDevice, Completion } from "../../../block/device.js";
import type { Decompressor } from "../format/decompress.js";
import { ClusterKind, ClusterRun } from "../format/entry.js";
import type { QcowFile } from "../format/file.js";
import { assertClustersStored, compressedBytesStored } from "../format/stored.js";
import type { Mapping } from "./mapping.js";
import { RangeWalk } from "./range-walk.js";

export class GuestReader extends RangeWalk {
  private readonly run = new ClusterRun();
  /** The last compressed cluster, decompressed: small reads of it come in sequence. */
  private readonly decompressed: Uint8Array;
  private decompressedFrom = -1;
  private input: Uint8Array | undefined;

  constructor(
    mapping: Mapping,
    private readonly file: QcowFile,
    /** Holds plain clusters; the image file itself, or its external data file. */
    private readonly dataFile: QcowFile,
    private readonly backing: BlockDevice | null,
    private readonly decompressor: Decompressor,
  ) {
    super(mapping, file.name);
    this.decompressed = new Uint8Array(mapping.clusterSizeBytes);
  }

  read(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    return this.walk(buffer, bufferOffset, lengthBytes, offsetBytes, 0);
  }

  /** Host clusters were freed: what was decompressed from them may be about to change. */
  forget(): void {
    this.decompressedFrom = -1;
  }

  protected override walkStep(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): number {
    const { mapping, run } = this;
    const { unitSizeBytes, unitsPerTable } = mapping;
    const unit = Math.floor(offsetBytes / unitSizeBytes);
    const l1Index = Math.floor(unit / unitsPerTable);
    const table = mapping.tableFor(l1Index);
    if (table === null) {
      this.wait = mapping.takeWait();
      if (this.wait !== undefined) return 0;
      const count = Math.min(lengthBytes, (l1Index + 1) * mapping.bytesPerTable - offsetBytes);
      this.readBacking(buffer, bufferOffset, count, offsetBytes);
      return count;
    }
    const inUnit = offsetBytes - unit * unitSizeBytes;
    const maxUnits = Math.ceil((inUnit + lengthBytes) / unitSizeBytes);
    mapping.decoder.scan(table.view, unit - l1Index * unitsPerTable, maxUnits, run);
    const count = Math.min(lengthBytes, run.unitCount * unitSizeBytes - inUnit);
    switch (run.kind) {
      case ClusterKind.Normal:
        assertClustersStored(this.dataFile, mapping.clusterSizeBytes, run.hostOffset + inUnit, count);
        this.wait = this.dataFile.read(buffer, bufferOffset, count, run.hostOffset + inUnit);
        break;
      case ClusterKind.ZeroPlain:
      case ClusterKind.ZeroAllocated:
        buffer.fill(0, bufferOffset, bufferOffset + count);
        break;
      case ClusterKind.Unallocated:
      case ClusterKind.UnallocatedHosted:
        this.readBacking(buffer, bufferOffset, count, offsetBytes);
        break;
      case ClusterKind.Compressed:
        this.readCompressed(buffer, bufferOffset, count, offsetBytes % mapping.clusterSizeBytes);
        break;
    }
    return count;
  }

  private readBacking(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): void {
    const { backing } = this;
    const stored = backing === null ? 0 : Math.min(lengthBytes, Math.max(0, backing.sizeBytes - offsetBytes));
    if (stored < lengthBytes) buffer.fill(0, bufferOffset + stored, bufferOffset + lengthBytes);
    if (backing !== null && stored > 0) {
      this.wait = backing.read(buffer, bufferOffset, stored, offsetBytes);
    }
  }

  private readCompressed(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    inCluster: number,
  ): void {
    const { hostOffset, compressedBytes } = this.run;
    if (this.decompressedFrom !== hostOffset) {
      const input = this.input ?? new Uint8Array(2 * this.mapping.clusterSizeBytes + 512);
      this.input = undefined;
      // What the file's end cuts off is not made up for: zeroes might be taken for data.
      const storedBytes = compressedBytesStored(this.file, hostOffset, compressedBytes);
      const completion = this.file.read(input, 0, storedBytes, hostOffset);
      if (completion !== undefined) {
        this.wait = completion.then(() => {
          this.decompress(input, storedBytes, hostOffset);
          this.copyOut(buffer, bufferOffset, lengthBytes, inCluster);
        });
        return;
      }
      this.decompress(input, storedBytes, hostOffset);
    }
    this.copyOut(buffer, bufferOffset, lengthBytes, inCluster);
  }

  private decompress(input: Uint8Array, lengthBytes: number, hostOffset: number): void {
    this.input = input;
    this.decompressedFrom = -1;
    this.decompressor.run(input.subarray(0, lengthBytes), this.decompressed, hostOffset);
    this.decompressedFrom = hostOffset;
  }

  private copyOut(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, inCluster: number): void {
    buffer.set(this.decompressed.subarray(inCluster, inCluster + lengthBytes), bufferOffset);
  }
}
