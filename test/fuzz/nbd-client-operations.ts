// What the client's fuzzer asks for, on a disk whose content no request changes, and what each must come to.

import type { NbdClient } from "../../src/nbd/client/client.js";
import { readRange, trimRange, writeRange, zeroRange } from "../../src/nbd/client/io.js";
import { ExtentReader } from "../../src/block/extent-map.js";
import { gatherZeroes } from "../../src/nbd/client/extent-map.js";
import type { Random } from "../support/random.js";

const KiB = 1024;
export const DISK_BYTES = 256 * KiB;
export const ZERO_FROM = 64 * KiB;
export const ZERO_TO = 96 * KiB;
/** Stands where no data has come; the disk has it nowhere. */
const UNTOUCHED = 0xee;
const GUARD_BYTES = 64;
/** A run of it that long is no chance. */
const UNTOUCHED_RUN = 16;

function makeDisk(): Buffer {
  const disk = Buffer.alloc(DISK_BYTES);
  for (let i = 0; i < DISK_BYTES; i++) disk[i] = 1 + ((i * 31 + (i >> 8) * 17) % 200);
  return disk.fill(0, ZERO_FROM, ZERO_TO);
}

export const DISK = makeDisk();

/** What the requests must know of the server. */
export interface Witness {
  readonly random: Random;
  readonly kind: string;
  /** It has said what is not so, or less than there is. */
  readonly hasLied: boolean;
  /** Something is wrong that no request's end shows. */
  note(problem: string): void;
}

export interface Operation {
  name: string;
  run: (client: NbdClient) => Promise<string | undefined>;
}

/** Each says what is wrong with its success. */
export function makeOperation(scenario: Witness): Operation {
  const { random } = scenario;
  const from = random.below(DISK_BYTES);
  const length = 1 + random.below(Math.min(DISK_BYTES - from, random.pick([512, 5000, 100_000])));
  const unit = random.chance(0.5) ? 1 : 4096;
  const start = from - (from % unit);
  const size = Math.min(Math.ceil(length / unit) * unit, DISK_BYTES - start);
  const what = `${start}+${size}`;
  switch (random.below(8)) {
    case 0:
    case 1:
      return { name: `read ${what}`, run: (client) => checkedRead(scenario, client, start, size) };
    case 2:
      return {
        name: `single read ${what}`,
        run: (client) => checkedRead(scenario, client, start, size, true),
      };
    case 3:
      return {
        name: `write ${what}`,
        run: (client) => silently(writeRange(client, DISK, start, size, start)),
      };
    case 4: {
      const policy = { mayUnmap: random.chance(0.5), fast: random.chance(0.5) };
      const bytes = Math.min(size, ZERO_TO - ZERO_FROM);
      return { name: "zero", run: (client) => silently(zeroRange(client, ZERO_FROM, bytes, policy)) };
    }
    case 5:
      return { name: "trim", run: (client) => silently(trimRange(client, ZERO_FROM, ZERO_TO - ZERO_FROM)) };
    case 6:
      return { name: "flush", run: (client) => silently(client.flush()) };
    default:
      return { name: "gather zeroes", run: (client) => checkedMap(scenario, client) };
  }
}

async function silently(work: Promise<void>): Promise<undefined> {
  await work;
}

async function checkedRead(
  scenario: Witness,
  client: NbdClient,
  offset: number,
  length: number,
  isSingle = false,
): Promise<string | undefined> {
  const buffer = Buffer.alloc(length + 2 * GUARD_BYTES, UNTOUCHED);
  try {
    if (isSingle) await client.read(buffer, GUARD_BYTES, length, offset);
    else await readRange(client, buffer, GUARD_BYTES, length, offset);
  } finally {
    const [before, after] = [buffer.subarray(0, GUARD_BYTES), buffer.subarray(GUARD_BYTES + length)];
    if (!isUntouched(before) || !isUntouched(after)) scenario.note("a read wrote beside its place");
  }
  const read = buffer.subarray(GUARD_BYTES, GUARD_BYTES + length);
  if (read.includes(Buffer.alloc(UNTOUCHED_RUN, UNTOUCHED))) return "a part of the data never came";
  // Asked before the answer was looked at: a lie that was told meanwhile may have been this one.
  if (scenario.hasLied || read.equals(DISK.subarray(offset, offset + length))) return undefined;
  return "the data is not the disk's";
}

function isUntouched(bytes: Buffer): boolean {
  return bytes.every((byte) => byte === UNTOUCHED);
}

async function checkedMap(scenario: Witness, client: NbdClient): Promise<string | undefined> {
  const map = await gatherZeroes(client);
  if (map === null || scenario.hasLied) return undefined;
  const reader = new ExtentReader(map, false);
  for (const at of [0, ZERO_FROM - 1, ZERO_FROM, ZERO_TO - 1, ZERO_TO]) {
    const { flag } = reader.extentAt(at, 1);
    if (flag && (at < ZERO_FROM || at >= ZERO_TO)) return `the map calls byte ${at} zero`;
    if (!flag && at === ZERO_FROM && scenario.kind === "intact") return "the map does not know the zeroes";
  }
  return undefined;
}
