// Runs of like status on an export: what BLOCK_STATUS answers, and what a structured read leaves out.
//
// Bounds: the runs of a list, and the questions that a list may cost. Without the second, one request for the whole
// of a fragmented disk would be millions of questions whose answers merge into a single run.

import { CowcatcherError } from "../../errors.js";
import type { BlockDevice, BlockStatus } from "../../block/device.js";
import type { StatusContext } from "./export.js";
import { NBD_STATE_HOLE, NBD_STATE_ZERO } from "../wire/protocol.js";

/** Consecutive runs from one offset on; `lengthsBytes[i]` has the status `flags[i]`. */
export class ExtentRuns {
  readonly lengthsBytes: number[] = [];
  readonly flags: number[] = [];
  coveredBytes = 0;

  /** Lengthens the last run where the status is the same. */
  push(lengthBytes: number, flags: number): void {
    this.coveredBytes += lengthBytes;
    const last = this.flags.length - 1;
    if (last >= 0 && this.flags[last] === flags) {
      this.lengthsBytes[last] = (this.lengthsBytes[last] ?? 0) + lengthBytes;
    } else {
      this.lengthsBytes.push(lengthBytes);
      this.flags.push(flags);
    }
  }
}

/** What a list may hold and cost. */
export interface ExtentBounds {
  maxExtents: number;
  maxQueries: number;
}

/** At a stretch: other guests wait meanwhile. The answer covers less then, and the client asks again. */
const MAX_GATHER_MS = 1;
/** Between two looks at the clock. */
const QUERIES_PER_LOOK = 32;

/** A device's base:allocation. */
export class ExtentList extends ExtentRuns {
  private queryCount = 0;

  constructor(
    private readonly device: BlockDevice,
    private readonly offsetBytes: number,
    private readonly lengthBytes: number,
    private readonly bounds: ExtentBounds,
  ) {
    super();
  }

  /**
   * Asks the device as long as it answers at once. Returns a promise's status that it came upon (the caller adds
   * it and goes on), or undefined when the range is covered or a bound is reached.
   */
  gather(): Promise<BlockStatus> | undefined {
    const { maxExtents, maxQueries } = this.bounds;
    const endMs = performance.now() + MAX_GATHER_MS;
    while (
      this.coveredBytes < this.lengthBytes &&
      this.lengthsBytes.length < maxExtents &&
      this.queryCount < maxQueries &&
      (this.queryCount === 0 || this.queryCount % QUERIES_PER_LOOK > 0 || performance.now() < endMs)
    ) {
      this.queryCount++;
      const status = this.device.blockStatus(
        this.offsetBytes + this.coveredBytes,
        this.lengthBytes - this.coveredBytes,
      );
      if (status instanceof Promise) return status;
      this.add(status);
    }
    return undefined;
  }

  async gatherRest(first: Promise<BlockStatus>): Promise<void> {
    for (let next: Promise<BlockStatus> | undefined = first; next !== undefined; next = this.gather()) {
      this.add(await next);
    }
  }

  private add(status: BlockStatus): void {
    const lengthBytes = progress(
      status.lengthBytes,
      this.lengthBytes,
      this.coveredBytes,
      this.device.name,
      this.offsetBytes,
    );
    this.push(lengthBytes, (status.data ? 0 : NBD_STATE_HOLE) | (status.zero ? NBD_STATE_ZERO : 0));
  }
}

/** The runs of a context that the export brings itself. */
export function contextRuns(
  context: StatusContext,
  offsetBytes: number,
  lengthBytes: number,
  { maxExtents, maxQueries }: ExtentBounds,
): ExtentRuns {
  const runs = new ExtentRuns();
  for (let query = 0; query < maxQueries; query++) {
    if (runs.coveredBytes >= lengthBytes || runs.lengthsBytes.length >= maxExtents) break;
    const status = context.status(offsetBytes + runs.coveredBytes, lengthBytes - runs.coveredBytes);
    runs.push(
      progress(status.lengthBytes, lengthBytes, runs.coveredBytes, context.name, offsetBytes),
      status.flags,
    );
  }
  return runs;
}

function progress(
  statusBytes: number,
  lengthBytes: number,
  coveredBytes: number,
  object: string,
  offsetBytes: number,
): number {
  const clamped = Math.min(statusBytes, lengthBytes - coveredBytes);
  if (clamped > 0) return clamped;
  throw new CowcatcherError({
    code: "INTERNAL",
    object,
    problem: "block status made no progress",
    offsetBytes: offsetBytes + coveredBytes,
  });
}
