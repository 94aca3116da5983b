// A worker of --verify: reads the target back, stretch by stretch, and compares each cluster with its digest of T0.
// It meets the others only in the counter that shares the stretches out; see src/backup/copy/verify-run.ts.
//
// Each worker opens the target itself, as an image like any other: what a restore would read is what is compared. No
// lock is taken, as the process that writes the target holds its own.

import { closeSync, openSync } from "node:fs";
import { systemName } from "../src/file-names.js";
import { FAULTS_VARIABLE, withTargetReadFaults } from "../src/backup/copy/faults.js";
import {
  CTL_NEXT_STRETCH,
  STRETCH_BYTES,
  type VerifyResult,
  type VerifyTask,
} from "../src/backup/copy/verify-task.js";
import { bootIsOver } from "../src/backup/copy/thread-boots.js";
import { ClusterDigests } from "../src/cow/digests.js";
import { keptPages } from "../src/cow/page-memory.js";
import { CTL_RUN, RUN_ABORTING } from "../src/cow/shared.js";
import { CowcatcherError, type ErrorDetails, toCowcatcherError } from "../src/errors.js";
import type { SourceDescription, SourceReader } from "../src/block/device.js";
import { openImage } from "../src/image/open.js";
import { openSource } from "../src/image/reader.js";
import { NbdImage } from "../src/nbd/client/device.js";
import { isNbdUri } from "../src/nbd/wire/uri.js";
import { libc, POSIX_FADV_DONTNEED } from "../src/native/libc.js";
import { roundUp } from "../src/units.js";

const QCOW2_SECTOR_BYTES = 512;

bootIsOver();

export default async function verify(task: VerifyTask): Promise<VerifyResult> {
  const checker = new Checker(task);
  return withErrors(task, checker.result, async () => {
    const { path, name, format, direct, source } = task;
    if (source !== undefined) return checkSource(task, checker, source);
    const isExport = isNbdUri(path);
    const options = { format, readOnly: true, direct, lock: false };
    const image = await openImage(isExport ? path : name, {
      ...options,
      openAs: isExport ? undefined : path,
    });
    try {
      if (image instanceof NbdImage) await image.handOver();
      checkSize(task, image.sizeBytes);
      const frozen = image.freeze();
      try {
        await checkSource(task, checker, { ...frozen.description, name });
      } finally {
        frozen.release();
      }
    } finally {
      await image.close();
    }
  });
}

async function checkSource(task: VerifyTask, checker: Checker, source: SourceDescription): Promise<void> {
  const { control, workerIndex, name } = task;
  const reader = withTargetReadFaults(
    process.env[FAULTS_VARIABLE],
    openSource(source, () => checker.mustLeave),
    { control: new Int32Array(control), workerIndex, targetName: name },
  );
  try {
    await checker.checkAll(reader);
  } finally {
    reader.close();
  }
}

/**
 * What was synced need not come from memory when it is read. Dropping may take seconds for a large file, hence not
 * on the main thread. Without libc the page cache answers for the medium.
 */
export async function dropCache(task: VerifyTask): Promise<VerifyResult> {
  return withErrors(task, { differingClusterCount: 0, firstDifferenceBytes: Infinity }, () => {
    // Whether an NBD server reads its medium or its memory is its own business.
    if (libc === null || isNbdUri(task.path) || task.source !== undefined) return;
    const fd = openSync(systemName(task.path), "r");
    try {
      libc.fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    } finally {
      closeSync(fd);
    }
  });
}

async function withErrors(
  task: VerifyTask,
  result: VerifyResult,
  work: () => Promise<void> | void,
): Promise<VerifyResult> {
  try {
    await work();
    return result;
  } catch (error) {
    const typed = toCowcatcherError(error, task.name);
    return { ...result, error: asTargetError(task, typed.toDetails()), stack: typed.stack };
  }
}

function checkSize({ name, format, geometry: { sizeBytes } }: VerifyTask, foundBytes: number): void {
  // A raw target may be a device that is larger than the disk; a qcow2 disk consists of whole sectors.
  const fits =
    format === "raw" ? foundBytes >= sizeBytes : foundBytes === roundUp(sizeBytes, QCOW2_SECTOR_BYTES);
  if (fits) return;
  throw new CowcatcherError({
    code: "VERIFY",
    object: name,
    problem: `read back, it is a disk of ${foundBytes} bytes, not of ${sizeBytes}`,
  });
}

/** The user knows the target by its final name; and metadata that is broken differs from what was written, too. */
function asTargetError({ path, name }: VerifyTask, details: ErrorDetails): ErrorDetails {
  if (details.object !== path && details.object !== name) return details;
  if (details.code !== "FORMAT") return { ...details, object: name };
  return { ...details, code: "VERIFY", object: name, problem: `read back, ${details.problem}` };
}

class Checker {
  readonly result: VerifyResult = { differingClusterCount: 0, firstDifferenceBytes: Infinity };
  readonly #task: VerifyTask;
  readonly #control: Int32Array;
  readonly #digests: ClusterDigests;
  readonly #chunk: Uint8Array;

  constructor(task: VerifyTask) {
    this.#task = task;
    this.#control = new Int32Array(task.control);
    this.#digests = new ClusterDigests(task.digests);
    this.#chunk = keptPages(0, task.geometry.chunkBytes, task.name);
  }

  async checkAll(reader: SourceReader): Promise<void> {
    const { sizeBytes } = this.#task.geometry;
    for (;;) {
      const start = Atomics.add(this.#control, CTL_NEXT_STRETCH, 1) * STRETCH_BYTES;
      if (start >= sizeBytes) return;
      const end = Math.min(start + STRETCH_BYTES, sizeBytes);
      const extent = reader.extent(start, end - start);
      if (extent.zero && extent.lengthBytes >= end - start) this.#expectZero(start, end);
      else await this.#checkStretch(reader, start, end);
      if (this.mustLeave) return;
    }
  }

  get mustLeave(): boolean {
    return Atomics.load(this.#control, CTL_RUN) === RUN_ABORTING;
  }

  #expectZero(start: number, end: number): void {
    const { clusterBytes } = this.#task.geometry;
    for (let offset = start; offset < end; offset += clusterBytes) {
      if (!this.#digests.expectsZero(offset / clusterBytes)) this.#note(offset);
    }
  }

  async #checkStretch(reader: SourceReader, start: number, end: number): Promise<void> {
    const { chunkBytes, clusterBytes } = this.#task.geometry;
    for (let offset = start; offset < end && !this.mustLeave; offset += chunkBytes) {
      const length = Math.min(chunkBytes, end - offset);
      await this.#read(reader, offset, length);
      for (let from = 0; from < length; from += clusterBytes) {
        const cluster = (offset + from) / clusterBytes;
        const to = Math.min(from + clusterBytes, length);
        if (!this.#digests.matches(cluster, this.#chunk, from, to)) this.#note(offset + from);
      }
    }
  }

  async #read(reader: SourceReader, offsetBytes: number, lengthBytes: number): Promise<void> {
    for (let done = 0; done < lengthBytes;) {
      const extent = reader.extent(offsetBytes + done, lengthBytes - done);
      const end = done + extent.lengthBytes;
      if (extent.zero) this.#chunk.fill(0, done, end);
      else await reader.read(this.#chunk, done, extent.lengthBytes, offsetBytes + done);
      done = end;
    }
  }

  #note(offsetBytes: number): void {
    this.result.differingClusterCount++;
    this.result.firstDifferenceBytes = Math.min(this.result.firstDifferenceBytes, offsetBytes);
  }
}
