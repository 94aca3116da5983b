// The two forms in which the bits of an epoch stand in a file.
//
//   active-N.bits   a page of header, then the bits as they are: written in place, a byte or a page at a time
//   epoch-N.bits    of an epoch that is over: a header, then runs, as pairs of LEB128 numbers (granules that are clear,
//                   granules that are set), and a checksum over all of it; made once, never changed
//
// An epoch's file may stand for several that were merged: `first` to `last`.

import { Bits } from "./bits.js";
import { CRC_BYTES, getNumber, getUuid, isSealed, putUuid, seal, UUID_BYTES, viewOf } from "./seal.js";

/** Where the bits begin in an active file: behind a page, so that theirs are whole pages. */
export const ACTIVE_HEADER_BYTES = 4096;
const ACTIVE_MAGIC = "CBTACTV1";
const EPOCH_MAGIC = "CBTEPOC1";
const MAGIC_BYTES = 8;

export interface EpochHeader {
  generation: string;
  /** Numbers of the epochs that the file stands for; equal for an active file. */
  first: number;
  last: number;
  granularityBytes: number;
  sizeBytes: number;
}

const OFFSET = {
  granularityBytes: 8,
  dirtyCount: 12,
  first: 16,
  last: 24,
  sizeBytes: 32,
  generation: 40,
} as const;
const EPOCH_HEADER_BYTES = OFFSET.generation + UUID_BYTES;

function encodeHeader(magic: string, header: EpochHeader, bytes: Uint8Array): void {
  const view = viewOf(bytes);
  bytes.set(Buffer.from(magic, "latin1"), 0);
  view.setUint32(OFFSET.granularityBytes, header.granularityBytes, true);
  for (const field of ["first", "last", "sizeBytes"] as const) {
    view.setBigUint64(OFFSET[field], BigInt(header[field]), true);
  }
  putUuid(bytes, OFFSET.generation, header.generation);
}

function decodeHeader(magic: string, bytes: Uint8Array): EpochHeader | undefined {
  if (Buffer.from(bytes.subarray(0, MAGIC_BYTES)).toString("latin1") !== magic) return undefined;
  const view = viewOf(bytes);
  const header = {
    generation: getUuid(bytes, OFFSET.generation),
    first: getNumber(view, OFFSET.first),
    last: getNumber(view, OFFSET.last),
    granularityBytes: view.getUint32(OFFSET.granularityBytes, true),
    sizeBytes: getNumber(view, OFFSET.sizeBytes),
  };
  const { first, last, sizeBytes, granularityBytes } = header;
  const isSound = first <= last && sizeBytes >= 0 && granularityBytes >= 512;
  return isSound ? header : undefined;
}

/** A new active file, with the given bits. */
export function encodeActive(header: EpochHeader, bits: Bits): Uint8Array {
  const bytes = new Uint8Array(ACTIVE_HEADER_BYTES + bits.bytes.length);
  const page = bytes.subarray(0, ACTIVE_HEADER_BYTES);
  encodeHeader(ACTIVE_MAGIC, header, page);
  seal(page);
  bytes.set(bits.bytes, ACTIVE_HEADER_BYTES);
  return bytes;
}

export interface DecodedEpoch {
  header: EpochHeader;
  bits: Bits;
}

/** @returns undefined for what is no such file, whole and sound. Its bits have no checksum: they change in place. */
export function decodeActive(bytes: Uint8Array): DecodedEpoch | undefined {
  const page = bytes.subarray(0, ACTIVE_HEADER_BYTES);
  if (page.length !== ACTIVE_HEADER_BYTES || !isSealed(page)) return undefined;
  const header = decodeHeader(ACTIVE_MAGIC, page);
  if (header === undefined) return undefined;
  const { sizeBytes, granularityBytes } = header;
  const neededBytes = Math.ceil(Math.ceil(sizeBytes / granularityBytes) / 8);
  // Cut short: bits that were there are gone.
  if (bytes.length < ACTIVE_HEADER_BYTES + neededBytes) return undefined;
  return { header, bits: Bits.fromBytes(bytes.subarray(ACTIVE_HEADER_BYTES), sizeBytes, granularityBytes) };
}

export function encodeEpoch(header: EpochHeader, bits: Bits): Uint8Array {
  const runs: number[] = [];
  for (let granule = 0; granule < bits.granuleCount;) {
    const set = bits.next(granule, true);
    if (set === bits.granuleCount) break;
    const clear = bits.next(set, false);
    pushNumber(runs, set - granule);
    pushNumber(runs, clear - set);
    granule = clear;
  }
  const bytes = new Uint8Array(EPOCH_HEADER_BYTES + runs.length + CRC_BYTES);
  encodeHeader(EPOCH_MAGIC, header, bytes);
  viewOf(bytes).setUint32(OFFSET.dirtyCount, bits.count(), true);
  bytes.set(runs, EPOCH_HEADER_BYTES);
  seal(bytes);
  return bytes;
}

/** @returns undefined for what is no such file, whole and sound. */
export function decodeEpoch(bytes: Uint8Array): DecodedEpoch | undefined {
  if (bytes.length < EPOCH_HEADER_BYTES + CRC_BYTES || !isSealed(bytes)) return undefined;
  const header = decodeHeader(EPOCH_MAGIC, bytes);
  if (header === undefined) return undefined;
  const bits = new Bits(header.sizeBytes, header.granularityBytes);
  const reader = { bytes, at: EPOCH_HEADER_BYTES, end: bytes.length - CRC_BYTES };
  for (let granule = 0; reader.at < reader.end;) {
    const set = granule + takeNumber(reader);
    const clear = set + takeNumber(reader);
    if (!(clear > set && clear <= bits.granuleCount)) return undefined;
    bits.set(set, clear - 1);
    granule = clear;
  }
  return bits.count() === viewOf(bytes).getUint32(OFFSET.dirtyCount, true) ? { header, bits } : undefined;
}

/** LEB128, unsigned. */
function pushNumber(bytes: number[], value: number): void {
  let rest = value;
  while (rest >= 0x80) {
    bytes.push((rest % 0x80) | 0x80);
    rest = Math.floor(rest / 0x80);
  }
  bytes.push(rest);
}

/** NaN where the number does not end within the file. */
function takeNumber(reader: { bytes: Uint8Array; at: number; end: number }): number {
  let value = 0;
  let factor = 1;
  while (reader.at < reader.end) {
    const byte = reader.bytes[reader.at++] ?? 0;
    value += (byte & 0x7f) * factor;
    if (byte < 0x80) return value;
    factor *= 0x80;
  }
  return NaN;
}
