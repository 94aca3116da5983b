// What a tracking folder is worth when an image is opened again. Nothing is written here.
//
//   how it ended                              what is believed
//   ───────────────────────────────────────   ─────────────────────────────────────────────────────────────────────
//   closed; the image looks as it did         the bits
//   closed; it does not, but it is qcow2      the bits, and those of the bitmap that was left in it
//     and a program that keeps bitmaps wrote
//   closed; it does not                       nothing: somebody wrote of whom nobody knows what
//   open, this boot: the process died         the bits: the page cache has outlived it
//   open, another boot: the host went down    `host`: the bits that reached the medium, and every extent of the log
//                                             `process`: nothing
//   anything missing, damaged, another's      nothing
//
// Where others may have written since an end that was none of the server's choosing, pulse.ts tells, or after the host's
// crash the time at which the system came up again.
//
// "Nothing" is a new generation: no checkpoint of the old one is ever believed again, and whoever asks for one is told.

import type { Bits } from "./bits.js";
import { activeName, type CheckpointList, decodeList, epochName, LIST_NAME } from "./checkpoint-list.js";
import { readLog } from "./activity-log.js";
import { decodeActive, decodeEpoch, type DecodedEpoch } from "./epoch-file.js";
import type { Boot } from "./fingerprint.js";
import type { TrackingFolder } from "./folder.js";
import { decodePulse, type ImageLooks, isTouchedByOthers, PULSE_NAME } from "./pulse.js";
import { decodeHead, type Head, HEAD_NAME, NO_IDENTITY } from "./head.js";

export const LOG_NAME = "al";
/** How far the start of the system, reckoned from a clock and a count of seconds, may be off. */
const BOOT_CLOCK_MS = 2_000;

/** What recovery asks of the image. */
export interface TrackedImage {
  readonly sizeBytes: number;
  /** See fingerprint.ts. */
  identity(): Promise<string | undefined>;
  /** Undefined where they tell nothing. */
  looks(): Promise<ImageLooks | undefined>;
  /**
   * What programs that keep bitmaps have written since this one (bitmap-name.ts) was left in the image at the clean end,
   * when the disk had sizeThen bytes: undefined where nobody can say so. Asked once, before anything is written to it.
   */
  writesOfOthers(uuid: string, sizeThen: number): Promise<Bits | undefined>;
}

export interface Kept {
  kind: "kept";
  head: Head;
  list: CheckpointList;
  /** What changed since the last epoch of the list. */
  active: Bits;
  /** Of the activity log; 0 where there is none that can be gone on with. */
  logSequence: number;
  /** How the bits came through, for the log. */
  how: "clean" | "merged" | "process-death" | "host-crash";
}

export type Recovered =
  | Kept
  | { kind: "new" }
  | { kind: "lost"; reason: string; /** Names that meant something. */ checkpoints: string[] };

/** @throws CowcatcherError IO where a file cannot be read for reasons of the system. */
export async function recover(
  folder: TrackingFolder,
  image: TrackedImage,
  boot: Boot,
  geometry: Pick<Head, "granularityBytes" | "extentBytes">,
): Promise<Recovered> {
  const names = await folder.list();
  const isOurs = names.some((name) =>
    /^(head|al|pulse|checkpoints\.json|(active|epoch)-\d+\.bits|kept-[\da-f-]+\.bits)$/.test(name),
  );
  if (!isOurs) return { kind: "new" };
  const list = decodeList((await folder.read(LIST_NAME)) ?? new Uint8Array());
  // A name may have been lost before, and made again.
  const checkpoints = [
    ...new Set([...(list?.checkpoints.map(({ name }) => name) ?? []), ...(list?.loss?.checkpoints ?? [])]),
  ];
  // Without a name nothing was relied on: no loss (a first start that was cut short looks like that, too).
  const isOfUse = list === undefined || checkpoints.length > 0;
  const lost = (reason: string): Recovered =>
    isOfUse ? { kind: "lost", reason, checkpoints } : { kind: "new" };
  const head = decodeHead((await folder.read(HEAD_NAME)) ?? new Uint8Array());
  if (head === undefined) return lost("the head of the tracking folder is missing or damaged");
  if (list === undefined) return lost("the list of checkpoints is missing or damaged");
  if (list.generation !== head.generation) return lost("the tracking folder was put together from two");
  if (head.state === "lost") return lost(list.loss?.reason ?? "keeping track had failed");
  if (head.granularityBytes !== geometry.granularityBytes) return lost("the granularity is another one");
  const problem = await distrust(folder, image, boot, head);
  if (problem !== undefined) return lost(problem);
  if (!(await areEpochsSound(folder, list))) return lost("the file of an epoch is missing or damaged");
  if (!(await areKeptSound(folder, list)))
    return lost("the file of a checkpoint's bits is missing or damaged");
  const bits = await activeBits(folder, head, list, image.sizeBytes);
  if (bits === undefined) return lost("the file of the active epoch is missing or damaged");
  const log = readLog((await folder.read(LOG_NAME)) ?? new Uint8Array(), head.generation);
  const kept = { kind: "kept", head, list, active: bits, logSequence: log?.lastSequence ?? 0 } as const;
  if (head.state === "clean") return keepClean(kept, folder, image, lost);
  if (head.bootId === boot.id) return { ...kept, how: "process-death" };
  if (log === undefined || head.extentBytes !== geometry.extentBytes)
    return lost("the activity log is missing or damaged");
  for (const extent of log.hot) {
    const start = extent * head.extentBytes;
    bits.setBytes(start, Math.min(head.extentBytes, image.sizeBytes - start));
  }
  return { ...kept, how: "host-crash" };
}

/** Why a folder that was left open is not to be believed, as far as that can be said without its bits. */
async function distrust(
  folder: TrackingFolder,
  image: TrackedImage,
  boot: Boot,
  head: Head,
): Promise<string | undefined> {
  if (head.state !== "open") return undefined;
  const looks = await image.looks();
  if (head.bootId === boot.id) {
    const pulse = decodePulse((await folder.read(PULSE_NAME)) ?? new Uint8Array());
    if (pulse?.generation !== head.generation) return "the server's sign of life is missing or damaged";
    const livedMs = (await folder.changedMs(PULSE_NAME)) ?? 0;
    if (looks === undefined || !isTouchedByOthers(pulse, livedMs, looks)) return undefined;
    return "the image was changed after the server that had it was gone";
  }
  if (head.mode === "process") return "the host went down, which tracking by 'process' does not outlive";
  if (looks === undefined || Number(looks.changedNs / 1_000_000n) <= boot.startedMs + BOOT_CLOCK_MS)
    return undefined;
  return "the image was changed after the host had come up again";
}

async function keepClean(
  kept: Omit<Kept, "how">,
  folder: TrackingFolder,
  image: TrackedImage,
  lost: (reason: string) => Recovered,
): Promise<Recovered> {
  const { head, active } = kept;
  const identity = await image.identity();
  const isAsItWas = head.identity !== NO_IDENTITY && identity === head.identity;
  if (isAsItWas && head.sizeBytes === image.sizeBytes) return { ...kept, how: "clean" };
  // A bitmap tells of writes to the image's own file, and of no other file in its place or below it.
  const others =
    head.bitmap !== null && (await areSameFiles(folder, image, head))
      ? await image.writesOfOthers(head.bitmap, head.sizeBytes)
      : undefined;
  if (others === undefined) return lost("the image was changed while no server kept track of it");
  active.or(others);
  return { ...kept, how: "merged" };
}

/** The image's own files are those that the server had, and its backing files are as they were. */
async function areSameFiles(folder: TrackingFolder, image: TrackedImage, head: Head): Promise<boolean> {
  const pulse = decodePulse((await folder.read(PULSE_NAME)) ?? new Uint8Array());
  const looks = await image.looks();
  return pulse?.generation === head.generation && pulse.files === looks?.files;
}

async function areEpochsSound(
  folder: TrackingFolder,
  { epochs, generation }: CheckpointList,
): Promise<boolean> {
  for (const range of epochs) {
    const epoch = await readEpoch(folder, range, generation);
    if (epoch === undefined) return false;
  }
  return true;
}

async function areKeptSound(
  folder: TrackingFolder,
  { checkpoints, generation }: CheckpointList,
): Promise<boolean> {
  for (const { keptBits } of checkpoints) {
    if (keptBits !== undefined && (await readKept(folder, keptBits, generation)) === undefined) return false;
  }
  return true;
}

/** @returns undefined where the file is missing, damaged, or another's. */
export async function readKept(
  folder: TrackingFolder,
  name: string,
  generation: string,
): Promise<Bits | undefined> {
  const file = decodeEpoch((await folder.read(name)) ?? new Uint8Array());
  return file?.header.generation === generation ? file.bits : undefined;
}

/** @returns undefined where the file is missing, damaged, or another's. */
export async function readEpoch(
  folder: TrackingFolder,
  { first, last }: { first: number; last: number },
  generation: string,
): Promise<DecodedEpoch | undefined> {
  const epoch = decodeEpoch((await folder.read(epochName({ first }))) ?? new Uint8Array());
  if (epoch?.header.generation !== generation) return undefined;
  // One that was merged with its successors before the list could say so holds more than is asked for: no harm.
  return epoch.header.first === first && epoch.header.last >= last ? epoch : undefined;
}

/** The active epoch's bits and those of the one that may have begun, on a disk of this size. */
async function activeBits(
  folder: TrackingFolder,
  head: Head,
  list: CheckpointList,
  sizeBytes: number,
): Promise<Bits | undefined> {
  const lastOver = list.epochs.at(-1)?.last ?? 0;
  let bits: Bits | undefined;
  for (const epoch of new Set([head.activeEpoch, head.nextEpoch])) {
    // Its file may be gone already: the list has it.
    if (epoch <= lastOver && head.nextEpoch > lastOver) continue;
    const file = decodeActive((await folder.read(activeName(epoch))) ?? new Uint8Array());
    if (file?.header.generation !== head.generation || file.header.first !== epoch) return undefined;
    bits ??= file.bits.resized(sizeBytes);
    bits.or(file.bits);
  }
  // What a disk has grown by was on no backup.
  bits?.setBytes(head.sizeBytes, sizeBytes - head.sizeBytes);
  return bits;
}
