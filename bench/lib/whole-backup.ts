// The guest over a whole backup: what it did from T0 to the backup's end, against the seconds after the end of the same
// run, so that a machine whose speed drifts falls on both alike. Not against those before T0: in them caches fill, code
// is compiled, and the job allocates its buffer.

import type { Measurement } from "./measure-guest.js";
import { formatFigure, markdownTable, median } from "./statistics.js";

/** After the end the target is still synced and the pool taken down. */
const SETTLE_SECONDS = 1;
/** Less of a reference says nothing. */
const MIN_REFERENCE_SECONDS = 3;

export interface WholeBackup {
  cell: string;
  contestant: string;
  measurements: Measurement[];
}

interface Share {
  iopsDuring: number;
  iopsAfter: number;
}

/** NaN where the backup did not end within the run. */
function shareOf({ series, marks }: Measurement): Share {
  const [start = NaN, end = NaN] = marks;
  const from = end + SETTLE_SECONDS;
  const last = series.at(-1)?.seconds ?? NaN;
  return {
    iopsDuring: meanIops(series, start, end),
    iopsAfter: last - from >= MIN_REFERENCE_SECONDS ? meanIops(series, from, last) : NaN,
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
      formatFigure(median(shares.map(({ iopsDuring }) => iopsDuring))),
      formatFigure(median(shares.map(({ iopsAfter }) => iopsAfter))),
      formatFigure(median(shares.map(({ iopsDuring, iopsAfter }) => iopsDuring / iopsAfter))),
      formatFigure(median(measurements.map(({ backupSeconds }) => backupSeconds ?? NaN))),
    ];
  });
  return markdownTable(["", "IOPS from T0 to the end", "IOPS afterwards", "ratio", "backup s"], rows);
}
