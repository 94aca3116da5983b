// Consistency check and repair of an image, as `qemu-img check` makes them, with its counts and its kind of messages.
//
// Two walks: every reference to a host cluster is counted (check/tables.ts), then the counts are held against the
// refcounts on disk and the COPIED flags (check/refcounts.ts). More references than the refcount is a corruption:
// a cluster could be freed and used again while it is needed. Fewer is a leak: space is lost, nothing else.
// Two things in one place show as a corruption too, since that cluster has a reference too many.
// What can be repaired, and in which order, is in repair.ts. After a repair that changed something the image is
// checked again, and that is the result. Memory is bounded; check/state.ts has the figures.

import { closeSync, openSync } from "node:fs";
import { CowcatcherError, ioError } from "../../../errors.js";
import { closeFile, readFirstBytes } from "../../../block/file/fileio.js";
import { NO_CHECKS, type ImageFormat } from "../../../block/format.js";
import { openImageFile } from "../../../block/file/image-file.js";
import { acquireImageLock } from "../../../block/file/locks.js";
import { PROBE_BYTES, probeFormat } from "../../probe.js";
import type { RepairMode } from "./state.js";
import type { CheckProgress } from "./tables.js";
import { BufferedFile, type QcowFile } from "../format/file.js";
import { INCOMPATIBLE_CORRUPT, INCOMPATIBLE_DIRTY, readHeader, type Qcow2Header } from "../format/header.js";
import { type CheckFindings, checkMetadata } from "./repair.js";

export interface CheckOptions {
  /** Undefined: probed. */
  format?: ImageFormat | undefined;
  /** Take QEMU's locks as a reader; true by default. */
  lock?: boolean | undefined;
  /** Undefined: the image is opened read-only. */
  repair?: RepairMode | undefined;
  onProgress?: CheckProgress | undefined;
}

export interface CheckResult {
  filename: string;
  format: ImageFormat;
  /** What the check could not look at. */
  checkErrors: number;
  corruptions: number;
  leaks: number;
  /** By the repair; what it left is in `corruptions` and `leaks`. */
  corruptionsFixed: number;
  leaksFixed: number;
  /** End of the last host cluster in use, in bytes. */
  imageEndOffset: number;
  /** Guest clusters. */
  totalClusters: number;
  allocatedClusters: number;
  fragmentedClusters: number;
  compressedClusters: number;
  /** One line a finding, as QEMU words them; MAX_MESSAGES at most, the counts go on. */
  messages: string[];
}

/**
 * Checks the image at `path`, and repairs it if asked. Main thread.
 * @throws CowcatcherError UNSUPPORTED (raw images have nothing to check; foreign formats), LOCKED, FORMAT (the
 * header or a table leads nowhere), LIMIT (MAX_HOST_CLUSTERS), IO. The check could not be made then.
 */
export async function checkImage(path: string, options: CheckOptions = {}): Promise<CheckResult> {
  const write = options.repair !== undefined;
  const fd = await openImageFile(path, { readOnly: !write, direct: false });
  try {
    if (options.lock ?? true) acquireImageLock(fd, path, { write, resize: write });
    return await checkOpened(path, fd, options);
  } finally {
    await closeFile(fd);
  }
}

async function checkOpened(path: string, fd: number, options: CheckOptions): Promise<CheckResult> {
  const { repair, onProgress } = options;
  const format = options.format ?? probeFormat(path, readFirstBytes(path, fd, PROBE_BYTES));
  if (format === "raw") {
    throw new CowcatcherError({
      code: "UNSUPPORTED",
      object: path,
      problem: NO_CHECKS,
      hint: "raw images have no metadata",
    });
  }
  const file = new BufferedFile(fd, path);
  const first = await checkMetadata(file, headerToCheck(file), repair, onProgress);
  const { corruptionsFixed, leaksFixed } = first.counts;
  const wasRepaired = corruptionsFixed + leaksFixed > 0;
  const header = headerToCheck(file);
  const last = wasRepaired ? await checkMetadata(file, header, undefined, onProgress) : first;
  return {
    filename: path,
    format,
    ...resultOf(header, last),
    corruptionsFixed,
    leaksFixed,
    messages: [...first.messages, ...(wasRepaired ? last.messages : [])],
  };
}

/** An image without a refcount table cannot be opened, but it can be repaired. */
function headerToCheck(file: QcowFile): Qcow2Header {
  const read = (buffer: Uint8Array, offsetBytes: number): number => {
    const count = Math.min(buffer.length, Math.max(0, file.endOffset - offsetBytes));
    file.readSync(buffer, 0, count, offsetBytes);
    return count;
  };
  return readHeader(read, file.name, { allowNoRefcountTable: true });
}

function resultOf(
  header: Qcow2Header,
  { counts, imageEndOffset }: CheckFindings,
): Omit<CheckResult, "filename" | "format" | "messages"> {
  return {
    imageEndOffset,
    totalClusters: Math.ceil(header.sizeBytes / 2 ** header.clusterBits),
    ...counts,
  };
}

/**
 * What opening an image for writing begins with: if it is marked dirty, its refcounts may be wrong (lazy refcounts,
 * or a repair that was killed), and they are made right. Nothing is done to an image that is marked corrupt, nor to
 * one that is not dirty. The caller holds the locks of a writer; `fd` may be open with O_DIRECT.
 * @throws CowcatcherError FORMAT where errors are left that no repair can correct; else as checkImage.
 */
export async function repairIfDirty(path: string, fd: number): Promise<void> {
  // A descriptor of its own: O_DIRECT would want aligned memory, and this one is closed before the guest's writes.
  const ownFd = reopen(path, fd);
  try {
    const file = new BufferedFile(ownFd, path);
    const header = headerToCheck(file);
    const isDirty = (header.incompatibleFeatures & INCOMPATIBLE_DIRTY) !== 0n;
    if (!isDirty || (header.incompatibleFeatures & INCOMPATIBLE_CORRUPT) !== 0n) return;
    const { counts } = await checkMetadata(file, header, "all");
    if (counts.checkErrors + counts.corruptions === 0) return;
    throw new CowcatcherError({
      code: "FORMAT",
      object: path,
      problem: `the image was not closed cleanly, and ${counts.checkErrors + counts.corruptions} errors in it cannot be repaired`,
      hint: "cowcatcher check shows them; read the image, or a copy, with qemu-img convert",
    });
  } finally {
    closeSync(ownFd);
  }
}

function reopen(path: string, fd: number): number {
  try {
    return openSync(`/proc/self/fd/${fd}`, "r+");
  } catch (error) {
    throw ioError("open", path, error);
  }
}

/** The fields of `qemu-img check --output=json`; those that are zero are left out, as there. */
export function checkResultToJson(result: CheckResult): Record<string, string | number> {
  const json: Record<string, string | number> = {};
  const counts = {
    "image-end-offset": result.imageEndOffset,
    "total-clusters": result.totalClusters,
    "allocated-clusters": result.allocatedClusters,
    "fragmented-clusters": result.fragmentedClusters,
    "compressed-clusters": result.compressedClusters,
    corruptions: result.corruptions,
    leaks: result.leaks,
    "corruptions-fixed": result.corruptionsFixed,
    "leaks-fixed": result.leaksFixed,
  };
  for (const [key, count] of Object.entries(counts)) {
    if (count !== 0) json[key] = count;
  }
  return { ...json, "check-errors": result.checkErrors, filename: result.filename, format: result.format };
}

/** The exit code of `check` (CLI.md): 0 clean, 1 could not be checked, 2 corrupt, 3 leaks only. */
export function checkExitCode(result: CheckResult): 0 | 1 | 2 | 3 {
  if (result.checkErrors > 0) return 1;
  if (result.corruptions > 0) return 2;
  return result.leaks > 0 ? 3 : 0;
}
