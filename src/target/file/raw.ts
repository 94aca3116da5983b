// A raw target: byte n of the disk is byte n of the file.
//
// A new file is sized first, so what is never written is a hole and zeroes cost nothing. Writers share nothing but
// the gate: their ranges are disjoint. Writes are synchronous on the worker's thread, which has nothing else to do.

import { CowcatcherError, ioError } from "../../errors.js";
import type { Completion } from "../../block/device.js";
import { truncateFile } from "../../block/file/calls.js";
import { FileTarget } from "./file-target.js";
import { openTargetFile, type TargetFile } from "./file.js";
import { enterGate, GATE_WORDS, leaveGate } from "./gate.js";
import { pwriteData, writeError, Zeroer } from "./pwrite.js";
import type { RawTargetDescription, Target, TargetOptions } from "../target.js";
import type { TargetWriter } from "../../cow/target-writer.js";

/** @throws CowcatcherError as openTargetFile; NO_SPACE for a device that is smaller than the disk. */
export async function createRawTarget(options: TargetOptions): Promise<Target> {
  if (options.backingFile !== undefined) {
    throw new CowcatcherError({
      code: "USAGE",
      object: options.path,
      problem: "a raw target has no backing file",
      hint: "choose qcow2",
    });
  }
  const file = await openTargetFile(options, options.direct);
  try {
    await sizeFile(file, options.sizeBytes);
  } catch (error) {
    await file.unlink();
    await file.closeDescriptors();
    throw error;
  }
  const shared = new SharedArrayBuffer(GATE_WORDS * Int32Array.BYTES_PER_ELEMENT);
  const description: RawTargetDescription = {
    format: "raw",
    name: options.path,
    fd: file.dataFd,
    bufferedFd: file.bufferedFd,
    sizeBytes: options.sizeBytes,
    direct: file.direct,
    startsZeroed: file.startsZeroed,
    shared,
  };
  return new FileTarget({
    file,
    description,
    granularityBytes: 1,
    shared,
    writeMetadata: () => Promise.resolve(),
    isCancelled: options.isCancelled,
  });
}

async function sizeFile(file: TargetFile, sizeBytes: number): Promise<void> {
  if (file.capacityBytes === null) {
    try {
      await truncateFile(file.bufferedFd, sizeBytes);
    } catch (error) {
      throw ioError("size the target", file.name, error);
    }
    return;
  }
  if (file.capacityBytes >= sizeBytes) return;
  throw new CowcatcherError({
    code: "NO_SPACE",
    object: file.name,
    problem: `the device has ${file.capacityBytes} bytes, the disk ${sizeBytes}`,
    hint: "choose a larger device",
  });
}

export class RawWriter implements TargetWriter {
  readonly #description: RawTargetDescription;
  readonly #gate: Int32Array;
  readonly #zeroer = new Zeroer();

  constructor(description: RawTargetDescription) {
    this.#description = description;
    this.#gate = new Int32Array(description.shared, 0, GATE_WORDS);
  }

  write(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    const { fd, bufferedFd, name } = this.#description;
    this.#checkRange(offsetBytes, lengthBytes);
    enterGate(this.#gate, name);
    try {
      const result = pwriteData(fd, bufferedFd, buffer, bufferOffset, lengthBytes, offsetBytes);
      if (result < 0) throw writeError(name, result, offsetBytes);
    } finally {
      leaveGate(this.#gate);
    }
    return undefined;
  }

  writeZeroes(offsetBytes: number, lengthBytes: number): Completion {
    const { bufferedFd, name, startsZeroed } = this.#description;
    this.#checkRange(offsetBytes, lengthBytes);
    if (startsZeroed) return undefined;
    enterGate(this.#gate, name);
    try {
      const result = this.#zeroer.zero(bufferedFd, offsetBytes, lengthBytes);
      if (result < 0) throw writeError(name, result, offsetBytes);
    } finally {
      leaveGate(this.#gate);
    }
    return undefined;
  }

  close(): void {
    // The descriptors are the main thread's.
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
