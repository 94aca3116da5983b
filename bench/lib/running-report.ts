// What `bench:running` shows: a table for each guest, and the aims of backups of guests that QEMU runs.

import { MiB } from "../../src/units.js";
import type { CellResult } from "./guest-report.js";
import type { Measurement } from "./measure-guest.js";
import { formatFigure, markdownTable, medianOf, ratiosOfRounds } from "./statistics.js";

export interface Rivals {
  fleecing: string;
  tuned: readonly string[];
  ours: readonly string[];
}

const HEADER = ["", "IOPS", "p99 ms", "longest ms", "CPU s", "backup s", "old data, MiB at most"];

export function runningTable({ name, contestants }: CellResult): string {
  const rows = contestants.map(({ name: contestant, measurements }) => {
    const figure = (pick: (measurement: Measurement) => number | undefined): string =>
      formatFigure(medianOf(measurements, pick));
    return [
      contestant,
      figure(({ iops }) => iops),
      figure(({ p99Ms }) => p99Ms),
      figure(({ longestMs }) => longestMs),
      figure(({ cpuSeconds }) => cpuSeconds),
      figure(({ backupSeconds }) => backupSeconds),
      figure(({ fleeceBytesMax }) => fleeceBytesMax && fleeceBytesMax / MiB),
    ];
  });
  return markdownTable([name, ...HEADER.slice(1)], rows);
}

interface Aim {
  words: string;
  pick: (measurement: Measurement) => number | undefined;
  /** The larger, the better. */
  isLeast: boolean;
  bound: number;
}

const AGAINST_FLEECING: Aim[] = [
  { words: "IOPS", pick: ({ iops }) => iops, isLeast: true, bound: 1.3 },
  { words: "p99", pick: ({ p99Ms }) => p99Ms, isLeast: false, bound: 1 },
  { words: "old data", pick: ({ fleeceBytesMax }) => fleeceBytesMax, isLeast: false, bound: 0.25 },
];
const AGAINST_PLAIN: Aim = { words: "IOPS", pick: ({ iops }) => iops, isLeast: true, bound: 5 };

/**
 * Ratios are of one round each; what is shown is their median, and the worst.
 * @param hasLimit the guest asks for so many writes a second and no more, so that its IOPS tell nothing
 */
export function runningAims(
  { name, contestants }: CellResult,
  rivals: Rivals,
  hasLimit: boolean,
): string[][] {
  const of = (contestant: string): readonly Measurement[] =>
    contestants.find((found) => found.name === contestant)?.measurements ?? [];
  const [bestTuned] = [...rivals.tuned].sort(
    (a, b) => medianOf(of(b), AGAINST_PLAIN.pick) - medianOf(of(a), AGAINST_PLAIN.pick),
  );
  const row = (own: string, rival: string, { words, pick, isLeast, bound }: Aim): string[] => {
    const ratios = ratiosOfRounds(of(own), of(rival), pick);
    const median = medianOf(ratios, (ratio) => ratio);
    const worst = isLeast ? Math.min(...ratios) : Math.max(...ratios);
    const isMet = isLeast ? median >= bound : median <= bound;
    const verdict = ratios.length === 0 ? "–" : isMet ? "yes" : "no";
    const what = `${name}: ${words}, ${own} against ${rival}`;
    return [what, `${isLeast ? "≥" : "≤"} ${bound}`, formatFigure(median), formatFigure(worst), verdict];
  };
  return rivals.ours.flatMap((own) => [
    ...AGAINST_FLEECING.filter(({ words }) => !hasLimit || words !== "IOPS").map((aim) =>
      row(own, rivals.fleecing, aim),
    ),
    ...(hasLimit || bestTuned === undefined ? [] : [row(own, bestTuned, AGAINST_PLAIN)]),
  ]);
}

export function aimsTable(rows: readonly (readonly string[])[]): string {
  return markdownTable(["aim", "bound", "median", "worst round", "met"], rows);
}
