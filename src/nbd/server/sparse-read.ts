// Structured reads that leave out what reads as zeroes.
//
// The reply is laid out in one stretch: for each run a chunk, data or hole, the last one marked as done. All of it
// is sent together once the device has filled the data, so an error can still turn the whole into one error chunk.

import type { BlockDevice, Completion } from "../../block/device.js";
import { ExtentList } from "./extents.js";
import { HOLE_SEARCH_MIN_BYTES, MAX_HOLE_QUERIES, MAX_READ_CHUNKS } from "./limits.js";
import { NBD_STATE_ZERO } from "../wire/protocol.js";
import type { ReplyWriter } from "./reply-format.js";
import type { RequestHeader } from "./request.js";
import type { Slab } from "./slab.js";

/** A hole below this costs the client more as a chunk of its own than as data. */
const MIN_HOLE_BYTES = HOLE_SEARCH_MIN_BYTES / 16;

/** What a search may take on a device that answers from its own tables. */
const CHEAP_SEARCH_MS = 0.05;
const SEARCH_PAUSE_FACTOR = 20;
const SEARCH_BOUNDS = { maxExtents: MAX_READ_CHUNKS - 1, maxQueries: MAX_HOLE_QUERIES };

export interface SparseRead {
  lengthsBytes: number[];
  isHole: boolean[];
}

/**
 * Looks for holes before a read, as long as that is cheap. A file system may walk all of a large file to find the
 * next hole, so a search that took long or found nothing is followed by a time without one: searches in vain take
 * at most one part in SEARCH_PAUSE_FACTOR of the time.
 */
export class HoleSearch {
  private nextSearchMs = 0;

  constructor(private readonly device: BlockDevice) {}

  /** How to send the range, or undefined where no hole is known that is worth leaving out. */
  plan(offsetBytes: number, lengthBytes: number): SparseRead | undefined {
    const startMs = performance.now();
    if (startMs < this.nextSearchMs) return undefined;
    const plan = this.search(offsetBytes, lengthBytes);
    const endMs = performance.now();
    const elapsedMs = endMs - startMs;
    if (plan === undefined || elapsedMs > CHEAP_SEARCH_MS) {
      this.nextSearchMs = Math.max(this.nextSearchMs, endMs + SEARCH_PAUSE_FACTOR * elapsedMs);
    }
    return plan;
  }

  private search(offsetBytes: number, lengthBytes: number): SparseRead | undefined {
    const extents = new ExtentList(this.device, offsetBytes, lengthBytes, SEARCH_BOUNDS);
    try {
      const pending = extents.gather();
      if (pending !== undefined) {
        // A device that has to wait for the answer is not asked again.
        this.nextSearchMs = Infinity;
        pending.catch(() => undefined);
        return undefined;
      }
    } catch {
      // Not knowing where the holes are is no reason to fail a read; the read itself will tell.
      return undefined;
    }
    return planOf(extents, lengthBytes);
  }
}

function planOf(extents: ExtentList, lengthBytes: number): SparseRead | undefined {
  const plan: SparseRead = { lengthsBytes: [], isHole: [] };
  extents.lengthsBytes.forEach((runBytes, i) => {
    addRun(plan, runBytes, ((extents.flags[i] ?? 0) & NBD_STATE_ZERO) !== 0 && runBytes >= MIN_HOLE_BYTES);
  });
  const restBytes = lengthBytes - extents.coveredBytes;
  if (restBytes > 0) addRun(plan, restBytes, false);
  return plan.isHole.includes(true) ? plan : undefined;
}

function addRun(plan: SparseRead, runBytes: number, isHole: boolean): void {
  const last = plan.isHole.length - 1;
  if (last >= 0 && plan.isHole[last] === isHole) {
    plan.lengthsBytes[last] = (plan.lengthsBytes[last] ?? 0) + runBytes;
  } else {
    plan.lengthsBytes.push(runBytes);
    plan.isHole.push(isHole);
  }
}

export function sparseReplyBytes(plan: SparseRead, { holeBytes, dataHeaderBytes }: ReplyWriter): number {
  return plan.lengthsBytes.reduce(
    (sum, runBytes, i) => sum + (plan.isHole[i] === true ? holeBytes : dataHeaderBytes + runBytes),
    0,
  );
}

/**
 * Lays out the reply at slab[at, ...) and starts the reads into it.
 * @throws what the device throws; a read that goes on rejects the completion instead.
 */
export function startSparseRead(
  plan: SparseRead,
  device: BlockDevice,
  slab: Slab,
  at: number,
  writer: ReplyWriter,
  request: RequestHeader,
): Completion {
  const { view, bytes } = slab;
  const { holeBytes, dataHeaderBytes } = writer;
  const pending: Promise<void>[] = [];
  let place = at;
  let runOffset = request.offsetBytes;
  plan.lengthsBytes.forEach((runBytes, i) => {
    const isLast = i === plan.lengthsBytes.length - 1;
    if (plan.isHole[i] === true) {
      writer.writeHole(view, place, request, isLast, runOffset, runBytes);
      place += holeBytes;
    } else {
      writer.writeDataHeader(view, place, request, isLast, runOffset, runBytes);
      const completion = readRun(device, bytes, place + dataHeaderBytes, runBytes, runOffset, pending);
      if (completion !== undefined) pending.push(completion);
      place += dataHeaderBytes + runBytes;
    }
    runOffset += runBytes;
  });
  return pending.length === 0 ? undefined : allSettled(pending);
}

/** A read that throws after an earlier one went on must not let go of the slab that the earlier one still fills. */
function readRun(
  device: BlockDevice,
  bytes: Buffer,
  bufferOffset: number,
  runBytes: number,
  runOffset: number,
  pending: readonly Promise<void>[],
): Completion {
  try {
    return device.read(bytes, bufferOffset, runBytes, runOffset);
  } catch (error) {
    if (pending.length === 0) throw error;
    return Promise.reject(error instanceof Error ? error : new TypeError(String(error)));
  }
}

/** Like Promise.all, but it settles only when no read uses the slab any more. */
async function allSettled(pending: Promise<void>[]): Promise<void> {
  for (const outcome of await Promise.allSettled(pending)) {
    if (outcome.status === "rejected") throw outcome.reason;
  }
}
