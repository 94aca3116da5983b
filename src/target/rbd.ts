// A Ceph RBD image as a target: byte n of the disk is byte n of the image.
//
//   main thread   createRbdTarget: a keeper opens the image, later flushes, makes the snapshot, gives the name, closes
//   each worker   RbdTargetWriter: asynchronous writes through the one handle
//
// An image that is not there is made, under a name of its own until it is complete (rbd/keeper-thread.ts); it reads as zeroes, so
// zeroes cost nothing there. One that is there is written in place, with --force alone: its snapshots are the history, and
// an incremental backup onto it with a snapshot after it is the next of them. A smaller one grows; what a larger one has
// behind the disk's end stays as it is. A backup that fails leaves such an image half new: its last snapshot is what counts.
//
// Written for Ceph: a chunk is an object, so captures that are drained go with their neighbours as one whole object; several
// are in flight a worker (workers/copy.ts); zeroes are write_zeroes, which drops whole objects. Nothing is cached between
// here and the OSDs, so what a write answers is theirs, and the flush at the end has nothing left but what librbd itself
// holds back. Only then the snapshot is made, with nothing in flight.
//
// Nothing here waits for Ceph on the main thread. A cancel comes in time until the keeper has said the last word: `commit` may
// hang, and is given up like everything before it (`commitMayHang`).

import { CowcatcherError } from "../errors.js";
import type { Completion, RbdSourceDescription } from "../block/device.js";
import { MiB } from "../units.js";
import { type RbdAddress, parseRbdAddress } from "../rbd/address.js";
import { checkAddressFiles } from "../rbd/connect.js";
import { createDoorMemory } from "../rbd/door.js";
import { RbdIo } from "../rbd/io.js";
import { RbdKeeper } from "../rbd/keeper.js";
import type { TargetWriter } from "../cow/target-writer.js";
import type { RbdTargetDescription, Target, TargetOptions } from "./target.js";

/** Larger objects are written in parts: a chunk is memory of each that a worker has in hand. */
const LARGEST_CHUNK_BYTES = 4 * MiB;

/**
 * @throws CowcatcherError USAGE for a wrong address or one of a snapshot, EXISTS without `force`, LOCKED for an image that
 *   another client has open, NO_BASIS for an incremental copy into none, UNSUPPORTED, NOT_FOUND for the pool, NO_SPACE, IO; CANCELLED.
 */
export async function createRbdTarget(options: TargetOptions): Promise<Target> {
  const { path: name, sizeBytes, force, targetSnapshot, niceness = 0, isCancelled } = options;
  const address = parseRbdAddress(name);
  checkOptions(options, address);
  checkAddressFiles(address);
  const door = createDoorMemory();
  const keeper = new RbdKeeper(name, door);
  try {
    const { opened } = await keeper.request(
      { kind: "open-target", address, name, door, sizeBytes, force, snapshot: targetSnapshot, niceness },
      isCancelled,
    );
    if (opened === undefined) throw new Error("the keeper did not say what it opened");
    const { image, isNew, objectBytes } = opened;
    if (isNew && options.inPlace === true) throw noState(name);
    const description: RbdTargetDescription = {
      format: "rbd",
      name,
      sizeBytes,
      handle: { image, door, name },
      startsZeroed: isNew,
      direct: false,
    };
    return new RbdTarget(description, keeper, Math.min(objectBytes, LARGEST_CHUNK_BYTES), targetSnapshot);
  } catch (error) {
    await keeper.release();
    throw error;
  }
}

function noState(name: string): CowcatcherError {
  return new CowcatcherError({
    code: "NO_BASIS",
    object: name,
    problem: "there is no image that could hold the state of the checkpoint",
    hint: "make a full backup there first",
  });
}

function checkOptions(
  { path: name, format, backingFile, compression }: TargetOptions,
  { snapshot }: RbdAddress,
): void {
  if (format !== "raw" || backingFile !== undefined || compression !== undefined) {
    throw new CowcatcherError({
      code: "UNSUPPORTED",
      object: name,
      problem: "an RBD image is written as raw, without backing file and compression",
      hint: "give -O raw; its snapshots (--target-snapshot) keep what was before",
    });
  }
  if (snapshot === undefined) return;
  throw new CowcatcherError({
    code: "USAGE",
    object: name,
    problem: "a snapshot cannot be written",
    hint: "leave @SNAP out; --target-snapshot makes one at the end",
  });
}

class RbdTarget implements Target {
  readonly name: string;
  readonly granularityBytes = 1;
  readonly commitMayHang = true;
  readonly unfinishedPath: string;
  readonly readBack: RbdSourceDescription;

  constructor(
    readonly description: RbdTargetDescription,
    readonly keeper: RbdKeeper,
    readonly chunkBytes: number,
    readonly snapshot: string | undefined,
  ) {
    const { name, sizeBytes, handle } = description;
    this.name = this.unfinishedPath = name;
    this.readBack = { format: "rbd", name, sizeBytes, handle, zeroes: null };
  }

  async complete(): Promise<void> {
    await this.keeper.request({ kind: "flush" });
  }

  async commit(): Promise<void> {
    await this.keeper.request({ kind: "commit", snapshot: this.snapshot });
    // Nothing more will be asked of it: its thread is free for the next image.
    await this.keeper.release();
  }

  async finish(): Promise<void> {
    await this.complete();
    await this.commit();
  }

  /** Closes the image, finished or not. */
  abort(): Promise<void> {
    return this.keeper.release();
  }

  abortSync(): void {
    // Nothing of Ceph's can be done in no time. What stays is removed by the next job for the same image.
  }
}

export class RbdTargetWriter implements TargetWriter {
  readonly #description: RbdTargetDescription;
  readonly #io: RbdIo;

  constructor(description: RbdTargetDescription, isCancelled: () => boolean) {
    this.#description = description;
    this.#io = new RbdIo(description.handle, isCancelled);
  }

  write(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    this.#checkRange(offsetBytes, lengthBytes);
    return this.#io.write(buffer, bufferOffset, lengthBytes, offsetBytes);
  }

  writeZeroes(offsetBytes: number, lengthBytes: number): Completion {
    this.#checkRange(offsetBytes, lengthBytes);
    return this.#description.startsZeroed ? undefined : this.#io.writeZeroes(offsetBytes, lengthBytes);
  }

  close(): void {
    this.#io.close();
  }

  #checkRange(offsetBytes: number, lengthBytes: number): void {
    const { name, sizeBytes } = this.#description;
    if (offsetBytes >= 0 && lengthBytes >= 0 && offsetBytes + lengthBytes <= sizeBytes) return;
    throw new CowcatcherError({
      code: "INTERNAL",
      object: name,
      problem: `a write of ${lengthBytes} bytes leaves the disk of ${sizeBytes}`,
      offsetBytes,
    });
  }
}
