// Snapshot table and bitmap directory for the check: records of variable length, one after another, each padded
// to a multiple of 8 (specification, "Snapshots" and "Bitmap directory"). Only what refers to clusters is kept.
// Past the end of the file there are zeroes, as for QEMU: such records are incomplete, but not the end of the check.

import { roundUp } from "../../units.js";
import type { CheckState } from "./check-state.js";
import { MAX_SNAPSHOT_EXTRA_BYTES, formatError, readNumber } from "./header.js";

const SNAPSHOT_FIXED_BYTES = 40;
/** 64-bit size of the VM state, size of the disk. */
const SNAPSHOT_REQUIRED_EXTRA_BYTES = 16;
const BITMAP_FIXED_BYTES = 24;
/** QEMU's limit of a bitmap's table: 32 MiB. */
const MAX_BITMAP_TABLE_ENTRIES = (32 * 2 ** 20) / 8;

export interface SnapshotRecord {
  id: string;
  name: string;
  l1TableOffset: number;
  l1Size: number;
  /** Version 3 requires extra data up to the disk's size. */
  isComplete: boolean;
}

export interface BitmapRecord {
  tableOffset: number;
  /** Entries. */
  tableSize: number;
}

export class RecordReader {
  /** @param position byte offset of the first record; afterwards the end of the last one, without its padding. */
  constructor(
    private readonly state: CheckState,
    public position: number,
  ) {}

  /** @throws CowcatcherError FORMAT where the record breaks a limit. */
  async nextSnapshot(): Promise<SnapshotRecord> {
    this.position = roundUp(this.position, 8);
    const fixed = await this.state.read(this.position, SNAPSHOT_FIXED_BYTES);
    const idBytes = fixed.getUint16(12);
    const nameBytes = fixed.getUint16(14);
    const extraBytes = fixed.getUint32(36);
    if (extraBytes > MAX_SNAPSHOT_EXTRA_BYTES) {
      throw formatError(this.state.name, `a snapshot has ${extraBytes} bytes of extra data`, this.position);
    }
    const textAt = this.position + SNAPSHOT_FIXED_BYTES + extraBytes;
    const text = Buffer.from((await this.state.read(textAt, idBytes + nameBytes)).buffer);
    this.position = textAt + idBytes + nameBytes;
    return {
      id: text.toString("utf8", 0, idBytes),
      name: text.toString("utf8", idBytes),
      l1TableOffset: readNumber(fixed, 0, "snapshot L1 table offset", this.state.name),
      l1Size: fixed.getUint32(8),
      isComplete: this.state.header.version < 3 || extraBytes >= SNAPSHOT_REQUIRED_EXTRA_BYTES,
    };
  }

  /** @throws CowcatcherError FORMAT where the record breaks a limit. */
  async nextBitmap(): Promise<BitmapRecord> {
    this.position = roundUp(this.position, 8);
    const fixed = await this.state.read(this.position, BITMAP_FIXED_BYTES);
    const tableSize = fixed.getUint32(8);
    if (tableSize > MAX_BITMAP_TABLE_ENTRIES) {
      throw formatError(this.state.name, `a bitmap table has ${tableSize} entries`, this.position);
    }
    this.position += BITMAP_FIXED_BYTES + fixed.getUint32(20) + fixed.getUint16(18);
    return { tableOffset: readNumber(fixed, 0, "bitmap table offset", this.state.name), tableSize };
  }
}
