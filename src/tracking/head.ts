// The head of a tracking folder: whose it is, and whether its bits can be relied on as they stand.
//
// Two copies of 4 KiB in one file, written in turn, each with a sequence number and a checksum: the valid one with the
// higher number counts, so that a copy that was being written when the power went leaves the other. A new copy is
// durable before anything relies on it. In between (every few seconds) the current copy's place in the file is only
// touched, so that the file's time tells until when the server lived. docs/tracking.md has the layout to the byte.

import { CRC_BYTES, getNumber, getUuid, isSealed, putUuid, seal, UUID_BYTES, viewOf } from "./seal.js";

export const HEAD_NAME = "head";
export const HEAD_COPY_BYTES = 4096;
export const HEAD_BYTES = 2 * HEAD_COPY_BYTES;
export const FORMAT_VERSION = 1;
const MAGIC = "CBTHEAD1";
const IDENTITY_BYTES = 32;

export const TRACKING_MODES = ["host", "process"] as const;
/** What the tracking of a disk holds through: the host's crash as well, or only that of the process. */
export type TrackingMode = (typeof TRACKING_MODES)[number];

/** `lost`: whatever the folder holds is not to be relied on. */
const STATES = ["clean", "open", "lost"] as const;
export type HeadState = (typeof STATES)[number];

export interface Head {
  sequence: number;
  /** New after every loss: nothing of another generation is ever believed. */
  generation: string;
  state: HeadState;
  mode: TrackingMode;
  /** Of the disk. */
  sizeBytes: number;
  granularityBytes: number;
  /** Unit of the activity log. */
  extentBytes: number;
  /** The epoch that guest writes go to. */
  activeEpoch: number;
  /** The one whose file is made already, to follow at T0; the same as activeEpoch where there is none. */
  nextEpoch: number;
  /** /proc/sys/kernel/random/boot_id of who wrote this. */
  bootId: string;
  /** Of who wrote this; for people. */
  processId: number;
  /** SHA-256 of the image's identity at the clean end (fingerprint.ts), in hex; all zero else. */
  identity: string;
  /** UUID of the bitmap that was left in the image at the clean end (recovery.ts); null: none was. */
  bitmap: string | null;
}

export const NO_IDENTITY = "0".repeat(IDENTITY_BYTES * 2);
const NO_UUID = "00000000-0000-0000-0000-000000000000";

const OFFSET = {
  magic: 0,
  version: 8,
  state: 12,
  mode: 16,
  granularityBytes: 20,
  sequence: 24,
  sizeBytes: 32,
  extentBytes: 40,
  activeEpoch: 48,
  nextEpoch: 56,
  processId: 64,
  generation: 72,
  bootId: 72 + UUID_BYTES,
  identity: 72 + 2 * UUID_BYTES,
  bitmap: 72 + 2 * UUID_BYTES + IDENTITY_BYTES,
} as const;

/** One copy, to be written at `copyOffset(head)`. */
export function encodeHead(head: Head): Uint8Array {
  const bytes = new Uint8Array(HEAD_COPY_BYTES);
  const view = viewOf(bytes);
  bytes.set(Buffer.from(MAGIC, "latin1"), OFFSET.magic);
  view.setUint32(OFFSET.version, FORMAT_VERSION, true);
  view.setUint32(OFFSET.state, STATES.indexOf(head.state), true);
  view.setUint32(OFFSET.mode, TRACKING_MODES.indexOf(head.mode), true);
  view.setUint32(OFFSET.granularityBytes, head.granularityBytes, true);
  for (const field of [
    "sequence",
    "sizeBytes",
    "extentBytes",
    "activeEpoch",
    "nextEpoch",
    "processId",
  ] as const) {
    view.setBigUint64(OFFSET[field], BigInt(head[field]), true);
  }
  putUuid(bytes, OFFSET.generation, head.generation);
  putUuid(bytes, OFFSET.bootId, head.bootId);
  bytes.set(Buffer.from(head.identity, "hex").subarray(0, IDENTITY_BYTES), OFFSET.identity);
  putUuid(bytes, OFFSET.bitmap, head.bitmap ?? NO_UUID);
  seal(bytes);
  return bytes;
}

/** The copies take turns. */
export function copyOffset({ sequence }: Pick<Head, "sequence">): number {
  return (sequence % 2) * HEAD_COPY_BYTES;
}

/** The newest valid copy, or undefined where there is none. */
export function decodeHead(file: Uint8Array): Head | undefined {
  const copies = [0, HEAD_COPY_BYTES].map((at) => decodeCopy(file.subarray(at, at + HEAD_COPY_BYTES)));
  const valid = copies.filter((copy) => copy !== undefined);
  return valid.sort((a, b) => b.sequence - a.sequence)[0];
}

function decodeCopy(bytes: Uint8Array): Head | undefined {
  if (bytes.length !== HEAD_COPY_BYTES || !isSealed(bytes)) return undefined;
  const view = viewOf(bytes);
  if (Buffer.from(bytes.subarray(0, MAGIC.length)).toString("latin1") !== MAGIC) return undefined;
  if (view.getUint32(OFFSET.version, true) !== FORMAT_VERSION) return undefined;
  const state = STATES[view.getUint32(OFFSET.state, true)];
  const mode = TRACKING_MODES[view.getUint32(OFFSET.mode, true)];
  if (state === undefined || mode === undefined) return undefined;
  const identity = bytes.subarray(OFFSET.identity, OFFSET.identity + IDENTITY_BYTES);
  const bitmap = getUuid(bytes, OFFSET.bitmap);
  return {
    state,
    mode,
    granularityBytes: view.getUint32(OFFSET.granularityBytes, true),
    sequence: getNumber(view, OFFSET.sequence),
    sizeBytes: getNumber(view, OFFSET.sizeBytes),
    extentBytes: getNumber(view, OFFSET.extentBytes),
    activeEpoch: getNumber(view, OFFSET.activeEpoch),
    nextEpoch: getNumber(view, OFFSET.nextEpoch),
    processId: getNumber(view, OFFSET.processId),
    generation: getUuid(bytes, OFFSET.generation),
    bootId: getUuid(bytes, OFFSET.bootId),
    identity: Buffer.from(identity).toString("hex"),
    bitmap: bitmap === NO_UUID ? null : bitmap,
  };
}

/** Where the checksum stands; for tests that damage it. */
export const HEAD_CRC_OFFSET = HEAD_COPY_BYTES - CRC_BYTES;
