// One bit for each granule of a disk: what changed in an epoch. Main thread; 2 MiB for 1 TiB.
//
// The bytes are those of the file too: bit n is bit n % 8 of byte n / 8, the least significant first, whatever the
// machine's byte order. Only whole bytes are looked at in turn, so the order of words never matters.

/** Files of bits are written by pages; memory is a whole number of them, so that a page never lacks its end. */
const PAGE_BYTES = 4096;

export interface Run {
  lengthBytes: number;
  dirty: boolean;
}

export class Bits {
  readonly bytes: Uint8Array;
  readonly #words: Uint32Array;

  constructor(
    readonly sizeBytes: number,
    readonly granularityBytes: number,
  ) {
    const buffer = new ArrayBuffer(Math.max(1, Math.ceil(this.granuleCount / 8 / PAGE_BYTES)) * PAGE_BYTES);
    this.bytes = new Uint8Array(buffer);
    this.#words = new Uint32Array(buffer);
  }

  get granuleCount(): number {
    return Math.ceil(this.sizeBytes / this.granularityBytes);
  }

  has(granule: number): boolean {
    return (((this.bytes[granule >>> 3] ?? 0) >>> (granule & 7)) & 1) === 1;
  }

  /** Granules first to last, both included. */
  hasAll(first: number, last: number): boolean {
    let byte = first >>> 3;
    const lastByte = last >>> 3;
    for (let from = first & 7; byte <= lastByte; byte++, from = 0) {
      const wanted = maskOf(from, byte === lastByte ? last & 7 : 7);
      if (((this.bytes[byte] ?? 0) & wanted) !== wanted) return false;
    }
    return true;
  }

  /** Sets granules first to last, both included. */
  set(first: number, last: number): void {
    let byte = first >>> 3;
    const lastByte = last >>> 3;
    for (let from = first & 7; byte <= lastByte; byte++, from = 0) {
      this.bytes[byte] = (this.bytes[byte] ?? 0) | maskOf(from, byte === lastByte ? last & 7 : 7);
    }
  }

  /** Every granule that the bytes of the disk touch; nothing for a length of 0. */
  setBytes(offsetBytes: number, lengthBytes: number): void {
    if (lengthBytes <= 0) return;
    this.set(this.granuleOf(offsetBytes), this.granuleOf(offsetBytes + lengthBytes - 1));
  }

  granuleOf(offsetBytes: number): number {
    return Math.floor(offsetBytes / this.granularityBytes);
  }

  /** What the other, of the same granularity, has set is set here; its granules past the end of this are dropped. */
  or(other: Bits): void {
    const words = this.#words;
    const count = Math.min(words.length, other.#words.length);
    for (let i = 0; i < count; i++) words[i] = (words[i] ?? 0) | (other.#words[i] ?? 0);
    this.#trim();
  }

  /** The granules that are set here and not in the other, which is of the same shape. */
  except(other: Bits): Bits {
    const result = new Bits(this.sizeBytes, this.granularityBytes);
    const words = result.#words;
    for (let i = 0; i < words.length; i++) words[i] = (this.#words[i] ?? 0) & ~(other.#words[i] ?? 0);
    return result;
  }

  /** For a disk of another size: granules past its end are dropped, new ones are clear. */
  resized(sizeBytes: number): Bits {
    const result = new Bits(sizeBytes, this.granularityBytes);
    result.or(this);
    return result;
  }

  copy(): Bits {
    return this.resized(this.sizeBytes);
  }

  setAll(): void {
    if (this.granuleCount > 0) this.set(0, this.granuleCount - 1);
  }

  /** How many granules are set. */
  count(): number {
    let count = 0;
    for (const word of this.#words) {
      if (word === 0) continue;
      let pairs = word - ((word >>> 1) & 0x55555555);
      pairs = (pairs & 0x33333333) + ((pairs >>> 2) & 0x33333333);
      count += Math.imul((pairs + (pairs >>> 4)) & 0x0f0f0f0f, 0x01010101) >>> 24;
    }
    return count;
  }

  /** The first granule from `from` on that is set (or, with `value` false, clear), or the number of granules. */
  next(from: number, value: boolean): number {
    const { bytes, granuleCount } = this;
    const skipped = value ? 0 : 0xff;
    let granule = from;
    while (granule < granuleCount) {
      if ((granule & 7) === 0 && bytes[granule >>> 3] === skipped) granule += 8;
      else if (this.has(granule) === value) return granule;
      else granule++;
    }
    return granuleCount;
  }

  /** The run of like granules from offsetBytes on, in bytes, at most lengthBytes; the range lies within the disk. */
  run(offsetBytes: number, lengthBytes: number): Run {
    const first = this.granuleOf(offsetBytes);
    const dirty = this.has(first);
    const end = this.next(first, !dirty) * this.granularityBytes;
    return { lengthBytes: Math.min(end - offsetBytes, lengthBytes), dirty };
  }

  /** No bit past the disk's end is ever set: `count` and `next` rely on it. */
  #trim(): void {
    const end = this.granuleCount;
    if ((end & 7) !== 0) this.bytes[end >>> 3] = (this.bytes[end >>> 3] ?? 0) & ((1 << (end & 7)) - 1);
    this.bytes.fill(0, Math.ceil(end / 8));
  }

  /** From a file's bytes, fewer than the disk needs where the file ends sooner. */
  static fromBytes(bytes: Uint8Array, sizeBytes: number, granularityBytes: number): Bits {
    const bits = new Bits(sizeBytes, granularityBytes);
    bits.bytes.set(bytes.subarray(0, bits.bytes.length));
    bits.#trim();
    return bits;
  }
}

/** Bits from to last, both included, of a byte. */
function maskOf(from: number, last: number): number {
  return (0xff << from) & (0xff >>> (7 - last));
}
