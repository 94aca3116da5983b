// A tracking folder is taken up: what it holds is judged (recovery.ts), and it says `open` before a guest writes.
//
//   nothing that can be believed   a new generation; the head, which makes it one, comes last
//   else                           the same one, in a new epoch's file: it holds all that was found before the log that
//                                  told of it begins anew
//
// Main thread.

import type { Completion } from "../block/device.js";
import type { Logger } from "../log.js";
import { KiB, MiB } from "../units.js";
import { ActiveEpoch } from "./active-epoch.js";
import { LOG_BYTES, type LogWrite, LogWriter } from "./activity-log.js";
import { Bits } from "./bits.js";
import { activeName, encodeList, LIST_NAME, type Loss } from "./checkpoint-list.js";
import { EpochStore } from "./epoch-store.js";
import type { Boot } from "./fingerprint.js";
import type { TrackingFile, TrackingFolder } from "./folder.js";
import {
  copyOffset,
  encodeHead,
  type Head,
  HEAD_BYTES,
  HEAD_NAME,
  NO_IDENTITY,
  type TrackingMode,
} from "./head.js";
import { HeadKeeper } from "./head-keeper.js";
import { encodePulse, NO_LOOKS, type ImageLooks, PULSE_NAME } from "./pulse.js";
import { type Kept, LOG_NAME, recover, type TrackedImage } from "./recovery.js";

/** QEMU's and Xen's; 2 MiB of bits for 1 TiB. */
export const GRANULARITY_BYTES = 64 * KiB;
/** DRBD's. */
const EXTENT_BYTES_MIN = 4 * MiB;
/** Of a larger disk the extents are larger, so that the hot set is a sixteenth of it. */
const EXTENTS_MAX = 65_536;

export interface TrackerOptions {
  folder: TrackingFolder;
  mode: TrackingMode;
  image: TrackedImage;
  /** Makes everything durable that the guest has written: see tracker.ts. */
  flushImage: () => Completion;
  boot: Boot;
  logger: Pick<Logger, "info" | "warn">;
  /** For tests. */
  extentBytes?: number;
  hotExtentsMax?: number;
  granularityBytes?: number;
}

export interface OpenedTracking {
  head: HeadKeeper;
  active: ActiveEpoch;
  store: EpochStore;
  pulseFile: TrackingFile;
  looks: ImageLooks | undefined;
  /** Null by `process`. */
  log: { file: TrackingFile; writer: LogWriter } | null;
}

/** A power of two, as all units here. */
export function extentBytesOf(sizeBytes: number): number {
  let extentBytes = EXTENT_BYTES_MIN;
  while (sizeBytes / extentBytes > EXTENTS_MAX) extentBytes *= 2;
  return extentBytes;
}

/** @throws CowcatcherError IO, NO_SPACE: the disk cannot be tracked there. */
export async function openTracking(options: TrackerOptions): Promise<OpenedTracking> {
  const { folder, image, boot, logger } = options;
  const granularityBytes = options.granularityBytes ?? GRANULARITY_BYTES;
  const extentBytes = options.extentBytes ?? extentBytesOf(image.sizeBytes);
  const found = await recover(folder, image, boot, { granularityBytes, extentBytes });
  const base = { mode: options.mode, sizeBytes: image.sizeBytes, granularityBytes, extentBytes };
  if (found.kind === "kept") {
    logger.info({ folder: folder.name, how: found.how }, "changed-block tracking goes on");
    return goOn(options, base, found);
  }
  const loss =
    found.kind === "lost" ? { reason: found.reason, atMs: Date.now(), checkpoints: found.checkpoints } : null;
  if (loss !== null) {
    logger.warn({ folder: folder.name, ...loss }, "all of the disk counts as changed: the tracking was lost");
  }
  return begin(options, base, loss);
}

async function begin(options: TrackerOptions, base: HeadBase, loss: Loss | null): Promise<OpenedTracking> {
  const { folder, image } = options;
  const generation = crypto.randomUUID();
  const head = headOf(options, base, { generation, sequence: 1, epoch: 1 });
  const list = { generation, epochs: [], checkpoints: [], loss };
  await folder.replace(LIST_NAME, encodeList(list));
  const bits = new Bits(image.sizeBytes, base.granularityBytes);
  await ActiveEpoch.write(folder, head, head.activeEpoch, bits);
  const writer = await newLog(options, generation);
  await newPulse(options, generation);
  await folder.replace(HEAD_NAME, wholeHead(head));
  return opened(options, head, bits, new EpochStore(folder, list, base.granularityBytes), writer);
}

async function goOn(options: TrackerOptions, base: HeadBase, found: Kept): Promise<OpenedTracking> {
  const { folder } = options;
  const { generation, sequence, activeEpoch, nextEpoch } = found.head;
  const epoch = Math.max(activeEpoch, nextEpoch) + 1;
  const head = headOf(options, base, { generation, sequence: sequence + 1, epoch });
  await ActiveEpoch.write(folder, head, epoch, found.active);
  await newPulse(options, generation);
  const headFile = await folder.open(HEAD_NAME);
  await headFile.writeDurably(encodeHead(head), copyOffset(head));
  await headFile.close();
  const writer =
    options.mode === "host" && found.logSequence > 0
      ? new LogWriter(generation, found.logSequence + 1)
      : await newLog(options, generation);
  const store = new EpochStore(folder, found.list, base.granularityBytes);
  return opened(options, head, found.active, store, writer);
}

async function opened(
  options: TrackerOptions,
  head: Head,
  bits: Bits,
  store: EpochStore,
  writer: LogWriter | null,
): Promise<OpenedTracking> {
  const { folder } = options;
  const looks = await options.image.looks();
  const headFile = await folder.open(HEAD_NAME);
  const pulseFile = await folder.open(PULSE_NAME);
  const active = await ActiveEpoch.open(folder, head.activeEpoch, bits);
  const log = writer === null ? null : { file: await folder.open(LOG_NAME), writer };
  if (log !== null) await writeAll(log.file, log.writer.base([]));
  await removeStale(folder, head, store);
  return { head: new HeadKeeper(head, headFile), active, store, pulseFile, looks, log };
}

type HeadBase = Pick<Head, "mode" | "sizeBytes" | "granularityBytes" | "extentBytes">;

function headOf(
  { boot }: TrackerOptions,
  base: HeadBase,
  { generation, sequence, epoch }: { generation: string; sequence: number; epoch: number },
): Head {
  return {
    ...base,
    generation,
    sequence,
    state: "open",
    activeEpoch: epoch,
    nextEpoch: epoch,
    bootId: boot.id,
    processId: process.pid,
    identity: NO_IDENTITY,
    bitmap: null,
  };
}

function wholeHead(head: Head): Uint8Array {
  const bytes = new Uint8Array(HEAD_BYTES);
  bytes.set(encodeHead(head), copyOffset(head));
  return bytes;
}

/** All blank: nothing of another generation. @returns null by `process`. */
async function newLog({ folder, mode }: TrackerOptions, generation: string): Promise<LogWriter | null> {
  if (mode !== "host") return null;
  await folder.replace(LOG_NAME, new Uint8Array(LOG_BYTES));
  return new LogWriter(generation, 1);
}

/** Before the head says `open`. */
async function newPulse({ folder, image }: TrackerOptions, generation: string): Promise<void> {
  const looks = (await image.looks()) ?? NO_LOOKS;
  await folder.replace(PULSE_NAME, encodePulse({ ...looks, writing: true, generation }));
}

async function writeAll(file: TrackingFile, writes: readonly LogWrite[]): Promise<void> {
  for (const { bytes, offsetBytes } of writes) await file.writeDurably(bytes, offsetBytes);
}

/** What earlier generations, and steps that were cut short, have left. */
async function removeStale(folder: TrackingFolder, head: Head, store: EpochStore): Promise<void> {
  const kept = new Set([
    activeName(head.activeEpoch),
    ...store.list.epochs.map(({ first }) => `epoch-${first}.bits`),
    ...store.list.checkpoints.map(({ keptBits }) => keptBits),
  ]);
  for (const name of await folder.list()) {
    const isBits = /^((active|epoch)-\d+|kept-[\da-f-]+)\.bits$/.test(name);
    if ((isBits && !kept.has(name)) || name.endsWith(".new")) await folder.remove(name);
  }
}
