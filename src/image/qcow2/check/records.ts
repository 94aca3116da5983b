// The bitmap directory for the check: records of variable length, one after another, each padded to a multiple of 8
// (specification, "Bitmap directory"). Only what refers to clusters is kept. Past the end of the file there are
// zeroes, as for QEMU: such records are incomplete, but not the end of the check.

import { roundUp } from "../../../units.js";
import type { CheckState } from "./state.js";
import { formatError, readNumber } from "../format/header.js";

const BITMAP_FIXED_BYTES = 24;
/** QEMU's limit of a bitmap's table: 32 MiB. */
const MAX_BITMAP_TABLE_ENTRIES = (32 * 2 ** 20) / 8;

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
