// Who wrote the image between the end of a server that was killed and the start of the next? A killed server leaves no
// record of what its image looked like last, as a clean end does (fingerprint.ts). So it keeps one while it lives:
//
//   quiet     the guest has written nothing for a while: the times of the image's last change are in the record. The next
//             server must find the same ones; anything else is another's write
//   writing   they move with every write. The record says until when the server lived, four times a second; a change
//             that is younger than that by more than a second is another's
//
//   quiet ──before a write is issued──► writing ──nothing for a quarter of a second──► quiet
//
// In the page cache alone, as it is for the process's death: 7 µs on the guest's path, four times a second at most.
// docs/tracking.md has the file to the byte. Main thread.

import { toCowcatcherError } from "../errors.js";
import type { Logger } from "../log.js";
import type { TrackingFile } from "./folder.js";
import { getUuid, isSealed, putUuid, seal, viewOf } from "./seal.js";

export const PULSE_NAME = "pulse";
export const PULSE_BYTES = 512;
export const PULSE_MS = 250;
/** A change that is younger than the last sign of life by more than this is another's. */
export const LATE_WRITE_MS = 1_000;

const MAGIC = "CBTPULS1";
const OFFSET = { magic: 0, writing: 8, changedNs: 16, generation: 24, files: 40 } as const;
const FILES_BYTES = 32;

/** What an image's files look like at a moment. */
export interface ImageLooks {
  /** Of the last change of content or inode of any file that the guest's writes go to, since 1970. */
  changedNs: bigint;
  /** SHA-256, in hex, of which files these are, and of what the backing files look like. */
  files: string;
}

export interface Pulse extends ImageLooks {
  writing: boolean;
  generation: string;
}

export function encodePulse(pulse: Pulse): Uint8Array {
  const bytes = new Uint8Array(PULSE_BYTES);
  const view = viewOf(bytes);
  bytes.set(Buffer.from(MAGIC, "latin1"), OFFSET.magic);
  view.setUint32(OFFSET.writing, pulse.writing ? 1 : 0, true);
  view.setBigUint64(OFFSET.changedNs, pulse.changedNs, true);
  putUuid(bytes, OFFSET.generation, pulse.generation);
  bytes.set(Buffer.from(pulse.files, "hex"), OFFSET.files);
  seal(bytes);
  return bytes;
}

/** @returns undefined for what is no such record, whole and sound. */
export function decodePulse(bytes: Uint8Array): Pulse | undefined {
  if (bytes.length !== PULSE_BYTES || !isSealed(bytes)) return undefined;
  if (Buffer.from(bytes.subarray(0, MAGIC.length)).toString("latin1") !== MAGIC) return undefined;
  const view = viewOf(bytes);
  return {
    writing: view.getUint32(OFFSET.writing, true) !== 0,
    changedNs: view.getBigUint64(OFFSET.changedNs, true),
    generation: getUuid(bytes, OFFSET.generation),
    files: Buffer.from(bytes.subarray(OFFSET.files, OFFSET.files + FILES_BYTES)).toString("hex"),
  };
}

/** Whether an image that was left open in this start of the system is not as its server left it. */
export function isTouchedByOthers(pulse: Pulse, livedMs: number, now: ImageLooks): boolean {
  if (pulse.files !== now.files) return true;
  if (!pulse.writing) return pulse.changedNs !== now.changedNs;
  return Number(now.changedNs / 1_000_000n) > livedMs + LATE_WRITE_MS;
}

export interface PulseParts {
  file: TrackingFile;
  generation: string;
  /** Of an image of which nothing can be known (a device, an export) undefined: it is always `writing`. */
  looks: () => Promise<ImageLooks | undefined>;
  /** Writing to the file is as quick as to the image. */
  isLocal: boolean;
  logger: Pick<Logger, "warn">;
}

export class PulseKeeper {
  readonly #parts: PulseParts;
  #looks: ImageLooks = NO_LOOKS;
  /** The record says so; no write may go on before it does. */
  #isWriting = true;
  /** Grows with each write, flush, and end of one. */
  #activity = 0;
  #activityAtBeat = -1;
  #beating: Promise<void> | undefined;
  #hasWarned = false;
  #isEnding = false;

  /** The file says `writing`. */
  constructor(parts: PulseParts, looks: ImageLooks | undefined) {
    this.#parts = parts;
    this.#looks = looks ?? NO_LOOKS;
  }

  /** Before anything is asked of the image that may write to it, and when it is done. @throws what the file throws. */
  touch(): void {
    this.#activity++;
    if (this.#isWriting) return;
    this.#isWriting = true;
    this.#writeNow();
  }

  /** The image is about to be closed, which writes to it: never quiet again. */
  end(): void {
    this.#isEnding = true;
    this.touch();
  }

  /** To be called every PULSE_MS. Never rejects. */
  beat(): Promise<void> {
    // One that hangs is not to be followed by others.
    this.#beating ??= this.#beat()
      .catch((error: unknown) => {
        // The record stays as it was: after a kill the bits may be distrusted for nothing.
        if (!this.#hasWarned) {
          const err = toCowcatcherError(error, PULSE_NAME);
          this.#parts.logger.warn({ err }, "the server's sign of life could not be written");
        }
        this.#hasWarned = true;
      })
      .finally(() => (this.#beating = undefined));
    return this.#beating;
  }

  async idle(): Promise<void> {
    await this.#beating;
  }

  async #beat(): Promise<void> {
    if (!this.#isWriting) return;
    const activity = this.#activity;
    const isQuiet = activity === this.#activityAtBeat && !this.#isEnding;
    this.#activityAtBeat = activity;
    const { file, isLocal, looks } = this.#parts;
    const now = isQuiet && isLocal ? await looks() : undefined;
    // A write that began meanwhile may have moved the times.
    if (now === undefined || this.#activity !== activity || this.#isEnding) {
      const bytes = this.#record();
      return file.write(bytes, 0, bytes.length, 0);
    }
    // In this turn, so that a write finds it done or not begun.
    this.#looks = now;
    this.#isWriting = false;
    this.#writeNow();
  }

  #writeNow(): void {
    const bytes = this.#record();
    this.#parts.file.writeNow(bytes, 0, bytes.length, 0);
  }

  #record(): Uint8Array {
    return encodePulse({ ...this.#looks, writing: this.#isWriting, generation: this.#parts.generation });
  }
}

/** Of what nothing can be known. */
export const NO_LOOKS: ImageLooks = { changedNs: 0n, files: "00".repeat(FILES_BYTES) };
