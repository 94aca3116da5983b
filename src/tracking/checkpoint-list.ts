// checkpoints.json: which boundaries between epochs have names, and in which files the epochs that are over stand.
//
//   epochs       1..3        4..4        5 (active)
//                       ▲           ▲
//   checkpoints      weekly       daily            changed since weekly = 4 ∪ active; since daily = active
//
// A dirty bitmap of QEMU's is a checkpoint, too, that may have been stopped (disabled), and may hold bits besides those of
// its epochs (merged from another, or left by a backup that did not get to its end); these stand in a file of its own:
//
//   changed since a checkpoint = kept bits ∪ (stopped ? nothing : all epochs from `epoch` on)
//
// Only a list that has such a checkpoint is of version 2: a program that knows version 1 alone would report too little by
// it, and refuses it.
//
// The file is replaced by rename, so that the old list or the new one is there, whole. Its checksum, of the JSON text of
// `list`, is for rot and for hands.

import { crc32c } from "./crc32c.js";

export const LIST_NAME = "checkpoints.json";
const PLAIN_VERSION = 1;
const BITMAP_VERSION = 2;

export interface Checkpoint {
  name: string;
  /** The same on all disks that were backed up together. */
  uuid: string;
  /** The epoch that began at its T0: it and all later ones hold what changed since. */
  epoch: number;
  createdMs: number;
  /** It holds its kept bits alone: what has changed since `epoch` is not in it. */
  isStopped?: true;
  /** Name of the file of the bits that it holds besides its epochs. */
  keptBits?: string;
}

/** Epochs that are over, in one file (epoch-FIRST.bits). */
export interface EpochRange {
  first: number;
  last: number;
}

/** What was given up, and why: for those who ask for a checkpoint that is gone. */
export interface Loss {
  reason: string;
  atMs: number;
  checkpoints: string[];
}

export interface CheckpointList {
  generation: string;
  /** In order. Numbers that a start of the server skipped lie between two at times. */
  epochs: EpochRange[];
  /** By epoch, the oldest first. */
  checkpoints: Checkpoint[];
  loss: Loss | null;
}

export function encodeList(list: CheckpointList): Uint8Array {
  const text = JSON.stringify(list);
  return Buffer.from(
    `${JSON.stringify({ version: versionOf(list), crc32c: crc32c(Buffer.from(text)), list }, null, 2)}\n`,
  );
}

/** @returns undefined for what is no such list, or not as it was written. */
export function decodeList(bytes: Uint8Array): CheckpointList | undefined {
  let file: { version?: unknown; crc32c?: unknown; list?: unknown } | null;
  try {
    file = JSON.parse(Buffer.from(bytes).toString("utf8")) as typeof file;
  } catch {
    return undefined;
  }
  if (file?.version !== PLAIN_VERSION && file?.version !== BITMAP_VERSION) return undefined;
  if (typeof file.list !== "object" || file.list === null) return undefined;
  // The checksum vouches for the shape: nobody but encodeList makes one.
  if (file.crc32c !== crc32c(Buffer.from(JSON.stringify(file.list)))) return undefined;
  return file.list as CheckpointList;
}

function versionOf({ checkpoints }: CheckpointList): number {
  const isBitmap = ({ isStopped, keptBits }: Checkpoint): boolean =>
    isStopped === true || keptBits !== undefined;
  return checkpoints.some(isBitmap) ? BITMAP_VERSION : PLAIN_VERSION;
}

/** A name that no other file of the folder has. */
export function newKeptName(): string {
  return `kept-${crypto.randomUUID()}.bits`;
}

export function epochName({ first }: Pick<EpochRange, "first">): string {
  return `epoch-${first}.bits`;
}

export function activeName(epoch: number): string {
  return `active-${epoch}.bits`;
}
