// Consistency check of an image, as `qemu-img check` makes it, with its counts and its kind of messages.
//
// Two walks: every reference to a host cluster is counted (check-tables.ts), then the counts are held against the
// refcounts on disk and the COPIED flags (check-refcounts.ts). More references than the refcount is a corruption:
// a cluster could be freed and used again while it is needed. Fewer is a leak: space is lost, nothing else.
// Two things in one place show as a corruption too, since that cluster has a reference too many.
// Nothing is repaired. Memory is bounded; check-state.ts has the figures.

import { fstatSync } from "node:fs";
import { CowcatcherError } from "../../errors.js";
import { closeFile, readFirstBytes, readFullySync } from "../fileio.js";
import type { ImageFormat } from "../format.js";
import { sizeOf } from "../devicesize.js";
import { openImageFile } from "../imagefile.js";
import { acquireImageLock } from "../locks.js";
import { PROBE_BYTES, probeFormat } from "../probe.js";
import { compareRefcounts } from "./check-refcounts.js";
import { CheckState } from "./check-state.js";
import { type CheckProgress, countReferences } from "./check-tables.js";
import { readHeader } from "./header.js";

export interface CheckOptions {
  /** Undefined: probed. */
  format?: ImageFormat | undefined;
  /** Take QEMU's locks as a reader; true by default. */
  lock?: boolean | undefined;
  onProgress?: CheckProgress | undefined;
}

export interface CheckResult {
  filename: string;
  format: ImageFormat;
  /** What the check could not look at. */
  checkErrors: number;
  corruptions: number;
  leaks: number;
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
 * Checks the image at `path`, opened read-only. Main thread; reads through libuv's pool.
 * @throws CowcatcherError UNSUPPORTED (raw images have nothing to check; foreign formats), LOCKED, FORMAT (the
 * header or a table leads nowhere), LIMIT (MAX_HOST_CLUSTERS), IO. The check could not be made then.
 */
export async function checkImage(path: string, options: CheckOptions = {}): Promise<CheckResult> {
  const fd = await openImageFile(path, { readOnly: true, direct: false });
  try {
    if (options.lock ?? true) acquireImageLock(fd, path, { write: false });
    return await checkOpened(path, fd, options);
  } finally {
    await closeFile(fd);
  }
}

async function checkOpened(path: string, fd: number, options: CheckOptions): Promise<CheckResult> {
  const format = options.format ?? probeFormat(path, readFirstBytes(path, fd, PROBE_BYTES));
  if (format === "raw") {
    throw new CowcatcherError({
      code: "UNSUPPORTED",
      object: path,
      problem: "this image format does not support checks",
      hint: "raw images have no metadata",
    });
  }
  const header = readHeader(
    (buffer, offsetBytes) => readFullySync(path, fd, buffer, 0, buffer.length, offsetBytes),
    path,
  );
  const state = new CheckState(path, fd, header, sizeOf(path, fd, fstatSync(fd)));
  await countReferences(state, options.onProgress);
  const imageEndOffset = await compareRefcounts(state);
  return {
    filename: path,
    format,
    imageEndOffset,
    totalClusters: Math.ceil(header.sizeBytes / state.clusterSizeBytes),
    ...state.counts,
    messages: state.messages,
  };
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
