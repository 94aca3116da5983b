// The guest over a whole backup: what it did from T0 to the backup's end, against the seconds before T0 of the same
// run, so that a machine whose speed drifts falls on both alike.

import type { Measurement } from "./measure-guest.js";
import { formatFigure, markdownTable, median } from "./statistics.js";

/** Of the seconds before T0: the first ones, in which caches fill and code is compiled, do not count. */
const WARM_UP_SECONDS = 2;

export interface WholeBackup {
  cell: string;
  contestant: string;
  measurements: Measurement[];
}

interface Share {
  iopsBefore: number;
  iopsDuring: number;
}

/** NaN where the backup did not end within the run. */
function shareOf({ series, marks }: Measurement): Share {
  const [start = NaN, end = NaN] = marks;
  return {
    iopsBefore: meanIops(series, WARM_UP_SECONDS, start),
    iopsDuring: meanIops(series, start, end),
  };
}

/** A sample is of the second that ends at its time; it counts by its part within [from, to). */
function meanIops(series: Measurement["series"], from: number, to: number): number {
  let sum = 0;
  let weight = 0;
  for (const { seconds, iops } of series) {
    const overlap = Math.min(seconds, to) - Math.max(seconds - 1, from);
    if (overlap <= 0) continue;
    sum += iops * overlap;
    weight += overlap;
  }
  return Number.isFinite(from) && Number.isFinite(to) ? sum / weight : NaN;
}

export function wholeBackupTable(results: readonly WholeBackup[]): string {
  const rows = results.map(({ cell, contestant, measurements }) => {
    const shares = measurements.map(shareOf);
    return [
      `${cell}: ${contestant}`,
      formatFigure(median(shares.map(({ iopsBefore }) => iopsBefore))),
      formatFigure(median(shares.map(({ iopsDuring }) => iopsDuring))),
      formatFigure(median(shares.map(({ iopsBefore, iopsDuring }) => iopsDuring / iopsBefore))),
      formatFigure(median(measurements.map(({ backupSeconds }) => backupSeconds ?? NaN))),
    ];
  });
  return markdownTable(["", "IOPS before T0", "IOPS from T0 to the end", "ratio", "backup s"], rows);
}
