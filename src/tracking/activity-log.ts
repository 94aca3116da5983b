// The activity log: which extents of the disk may have bits that are not on the medium yet (DRBD's idea, with its
// name). An extent is in it before the first guest write to it is issued, and until its bits are durable.
//
//   ring of 64 records of 4 KiB, written in turn through O_DSYNC:
//     add    these extents are hot from now on
//     evict  these are not any more: their bits are durable
//     base   part i of n of all that is hot; n parts in a row, one sequence number after another
//
// A base is written every 32 records, so what counts, the newest complete base and all after it, is always in the ring
// (5 parts of a full hot set, 32 records, 5 parts of the base under way: 42 of 64).
//
// Torn or rotten. A record is eight sectors of 512 bytes, each sealed by itself and with the record's number in it. What
// the power cut in the middle of a write is a record whose sectors are all sound, some of them of the number that stood
// there before (64 less, or none): nothing relied on it yet, and it is left out. A sector that is not sound was
// damaged: then the log is worth nothing, and the recovery says so. So a power cut in a write costs no chain, and rot is
// never taken for one.
//
// Pure: tracker.ts writes what `LogWriter` makes of its orders, recovery.ts reads.

import {
  CRC_BYTES,
  getNumber,
  getUuid,
  isBlank,
  isSealed,
  putUuid,
  seal,
  UUID_BYTES,
  viewOf,
} from "./seal.js";

export const RECORD_BYTES = 4096;
export const RECORD_COUNT = 64;
export const LOG_BYTES = RECORD_BYTES * RECORD_COUNT;
/** Records between two bases. */
const BASE_INTERVAL = 32;
const SECTOR_BYTES = 512;
const SECTORS_PER_RECORD = RECORD_BYTES / SECTOR_BYTES;
const MAGIC = 0x314c4143; // "CAL1"

const KINDS = ["add", "evict", "base"] as const;
type Kind = (typeof KINDS)[number];

const OFFSET = { magic: 0, kind: 4, part: 6, partCount: 8, count: 10, sequence: 12, generation: 20 } as const;
const EXTENTS_AT = OFFSET.generation + UUID_BYTES;
const EXTENTS_PER_SECTOR = (SECTOR_BYTES - CRC_BYTES - EXTENTS_AT) / 4;
export const EXTENTS_PER_RECORD = Math.floor(EXTENTS_PER_SECTOR) * SECTORS_PER_RECORD;

/** A piece of the file to write, durably. */
export interface LogWrite {
  bytes: Uint8Array;
  offsetBytes: number;
}

export class LogWriter {
  #sinceBase = 0;

  /** @param nextSequence from 1 on; a log that is taken over goes on where it ended. */
  constructor(
    readonly generation: string,
    private nextSequence: number,
  ) {}

  /** For more extents than a record holds, several. The writes are to be made in their order. */
  record(kind: "add" | "evict", extents: readonly number[]): LogWrite[] {
    const writes: LogWrite[] = [];
    for (let at = 0; at < extents.length; at += EXTENTS_PER_RECORD) {
      writes.push(this.#encode(kind, extents.slice(at, at + EXTENTS_PER_RECORD), 0, 1));
    }
    this.#sinceBase += writes.length;
    return writes;
  }

  /** So many records have gone by that a base must come before the next `count`. */
  needsBase(count = 1): boolean {
    return this.#sinceBase + count > BASE_INTERVAL;
  }

  base(hot: readonly number[]): LogWrite[] {
    const partCount = Math.max(1, Math.ceil(hot.length / EXTENTS_PER_RECORD));
    this.#sinceBase = 0;
    return Array.from({ length: partCount }, (_, part) =>
      this.#encode(
        "base",
        hot.slice(part * EXTENTS_PER_RECORD, (part + 1) * EXTENTS_PER_RECORD),
        part,
        partCount,
      ),
    );
  }

  #encode(kind: Kind, extents: readonly number[], part: number, partCount: number): LogWrite {
    const sequence = this.nextSequence++;
    const bytes = new Uint8Array(RECORD_BYTES);
    const perSector = Math.floor(EXTENTS_PER_SECTOR);
    for (let sector = 0; sector < SECTORS_PER_RECORD; sector++) {
      const place = bytes.subarray(sector * SECTOR_BYTES, (sector + 1) * SECTOR_BYTES);
      const view = viewOf(place);
      const own = extents.slice(sector * perSector, (sector + 1) * perSector);
      view.setUint32(OFFSET.magic, MAGIC, true);
      view.setUint16(OFFSET.kind, KINDS.indexOf(kind), true);
      view.setUint16(OFFSET.part, part, true);
      view.setUint16(OFFSET.partCount, partCount, true);
      view.setUint16(OFFSET.count, own.length, true);
      view.setBigUint64(OFFSET.sequence, BigInt(sequence), true);
      putUuid(place, OFFSET.generation, this.generation);
      own.forEach((extent, i) => view.setUint32(EXTENTS_AT + i * 4, extent, true));
      seal(place);
    }
    return { bytes, offsetBytes: (sequence % RECORD_COUNT) * RECORD_BYTES };
  }
}

interface LogRecord {
  kind: Kind;
  part: number;
  partCount: number;
  sequence: number;
  extents: number[];
}

export interface RecoveredLog {
  hot: Set<number>;
  lastSequence: number;
}

/** @returns undefined where the log was damaged, is another generation's, or holds no complete base. */
export function readLog(file: Uint8Array, generation: string): RecoveredLog | undefined {
  if (file.length < LOG_BYTES) return undefined;
  const records = new Map<number, LogRecord>();
  let last = 0;
  let torn = 0;
  for (let slot = 0; slot < RECORD_COUNT; slot++) {
    const record = readRecord(file.subarray(slot * RECORD_BYTES, (slot + 1) * RECORD_BYTES), generation);
    if (record === "damaged") return undefined;
    if (record === "blank") continue;
    // Only one write is ever under way.
    if (record === "torn") {
      if (++torn > 1) return undefined;
      continue;
    }
    if (record.sequence % RECORD_COUNT !== slot) return undefined;
    records.set(record.sequence, record);
    last = Math.max(last, record.sequence);
  }
  const first = startOfBase(records, last);
  if (first === undefined) return undefined;
  const hot = new Set<number>();
  for (let sequence = first; sequence <= last; sequence++) {
    const record = records.get(sequence);
    if (record === undefined) return undefined;
    // A base under way repeats what is hot already, and adds nothing.
    for (const extent of record.extents) {
      if (record.kind === "evict") hot.delete(extent);
      else hot.add(extent);
    }
  }
  return { hot, lastSequence: last };
}

/** Sequence number of the first part of the newest complete base. */
function startOfBase(records: ReadonlyMap<number, LogRecord>, last: number): number | undefined {
  for (let end = last; end > last - RECORD_COUNT && end > 0; end--) {
    const record = records.get(end);
    if (record === undefined) return undefined;
    if (record.kind === "base" && record.part === record.partCount - 1) return end - record.part;
  }
  return undefined;
}

function readRecord(bytes: Uint8Array, generation: string): LogRecord | "blank" | "torn" | "damaged" {
  const sectors = Array.from({ length: SECTORS_PER_RECORD }, (_, i) =>
    readSector(bytes.subarray(i * SECTOR_BYTES, (i + 1) * SECTOR_BYTES), generation),
  );
  if (sectors.includes("damaged")) return "damaged";
  const numbers = new Set(sectors.map((sector) => (typeof sector === "object" ? sector.sequence : 0)));
  if (numbers.size > 2) return "damaged";
  if (numbers.size === 2) {
    const [low = 0, high = 0] = [...numbers].sort((a, b) => a - b);
    return low === 0 || high - low === RECORD_COUNT ? "torn" : "damaged";
  }
  const records = sectors.filter((sector) => typeof sector === "object");
  const [head] = records;
  if (head === undefined) return "blank";
  return { ...head, extents: records.flatMap(({ extents }) => extents) };
}

function readSector(bytes: Uint8Array, generation: string): LogRecord | "blank" | "damaged" {
  if (isBlank(bytes)) return "blank";
  const view = viewOf(bytes);
  if (!isSealed(bytes) || view.getUint32(OFFSET.magic, true) !== MAGIC) return "damaged";
  if (getUuid(bytes, OFFSET.generation) !== generation) return "damaged";
  const kind = KINDS[view.getUint16(OFFSET.kind, true)];
  const count = view.getUint16(OFFSET.count, true);
  if (kind === undefined || count > EXTENTS_PER_SECTOR) return "damaged";
  return {
    kind,
    part: view.getUint16(OFFSET.part, true),
    partCount: view.getUint16(OFFSET.partCount, true),
    sequence: getNumber(view, OFFSET.sequence),
    extents: Array.from({ length: count }, (_, i) => view.getUint32(EXTENTS_AT + i * 4, true)),
  };
}
