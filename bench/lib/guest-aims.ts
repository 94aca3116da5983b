// The project's aims for a guest's writes, and whether a run of their cells (`--aims`) has met them.
//
// An aim is a bound on one figure, or on a ratio of two, of medians over the rounds. What a single write may take is
// shown with its worst round as well.

import type { Measurement } from "./measure-guest.js";
import { THREADS } from "./guest-cells.js";
import type { CellResult } from "./guest-report.js";
import { formatFigure, markdownTable, medianOf } from "./statistics.js";

interface Figure {
  median: number;
  /** Over the rounds. */
  worst: number;
}

export interface Aim {
  name: string;
  figure: (results: Results) => Figure;
  bound: number;
  isUpper: boolean;
}

type Pick = (measurement: Measurement) => number | undefined;

/** The run's figures by the names of cell and contestant. */
export class Results {
  constructor(private readonly cells: readonly CellResult[]) {}

  figure(cell: string, contestant: string, pick: Pick): Figure {
    const measurements =
      this.cells.find(({ name }) => name === cell)?.contestants.find(({ name }) => name === contestant)
        ?.measurements ?? [];
    const values = measurements.map(pick).filter((value) => value !== undefined);
    return {
      median: medianOf(measurements, pick),
      worst: values.length === 0 ? NaN : Math.max(...values),
    };
  }

  /** Names of the cells that were measured, with those of their contestants. */
  get contents(): { cell: string; contestants: string[] }[] {
    return this.cells.map(({ name, contestants }) => ({
      cell: name,
      contestants: contestants.map((contestant) => contestant.name),
    }));
  }
}

const iops: Pick = (measurement) => measurement.iops;
const p99: Pick = ({ p99Ms }) => p99Ms;
/** Processor time of the server for one request of the guest, in microseconds. */
const cpuPerRequest: Pick = ({ cpuSeconds, iops, guestSeconds }) =>
  (cpuSeconds / (iops * guestSeconds)) * 1e6;
const longest: Pick = ({ longestMs }) => longestMs;

const NO_BACKUP = "cowcatcher, no backup";
const BUFFERED = "cowcatcher, buffered";
const FLEECING = "QEMU, fleecing";

const MAIN = "randwrite 32k qd8";
const SMALL = "randwrite 4k qd32";
const FIXED = "fixed 4000/s 32k";
const SLOW_BUFFERED = "50 MB/s, buffered 1 GiB";
const TOO_SMALL = `${MAIN}, raw, 50 MB/s, buffered 64 MiB`;
/** One run of two processes that are both held to the same rate differs from the other by that much. */
const SAME_TIME = 1.01;

type Place = readonly [cell: string, contestant: string];

function ratio(name: string, pick: Pick, [a, b]: readonly [Place, Place], bound: number): Aim {
  return {
    name,
    bound,
    isUpper: pick === p99 || pick === cpuPerRequest,
    figure: (results) => {
      const median = results.figure(...a, pick).median / results.figure(...b, pick).median;
      return { median, worst: NaN };
    },
  };
}

function atMost(name: string, pick: Pick, place: Place, bound: number): Aim {
  return { name, bound, isUpper: true, figure: (results) => results.figure(...place, pick) };
}

const AIMS: readonly Aim[] = [
  ...[MAIN, SMALL].flatMap((pattern) =>
    (["raw", "qcow2"] as const).map((format) => {
      const cell = `${pattern}, ${format}, no backup`;
      const name = `${pattern}, ${format}, no backup: IOPS against QEMU's`;
      return ratio(
        name,
        iops,
        [
          [cell, NO_BACKUP],
          [cell, "QEMU, no backup"],
        ],
        format === "raw" ? 1.3 : 1,
      );
    }),
  ),
  ...(["raw", "qcow2"] as const).flatMap((format) => {
    const cell = `${MAIN}, ${format}, ${SLOW_BUFFERED}`;
    const alone = `${MAIN}, ${format}, no backup`;
    return [
      ratio(
        `${MAIN}, ${format}, buffered: IOPS against fleecing's`,
        iops,
        [
          [cell, BUFFERED],
          [cell, FLEECING],
        ],
        2,
      ),
      ratio(
        `${MAIN}, ${format}, buffered: IOPS against ours without a backup`,
        iops,
        [
          [cell, BUFFERED],
          [alone, NO_BACKUP],
        ],
        0.85,
      ),
    ];
  }),
  ratio(
    `${SMALL}, raw, buffered: IOPS against ours without a backup`,
    iops,
    [
      [`${SMALL}, raw, ${SLOW_BUFFERED}`, BUFFERED],
      [`${SMALL}, raw, no backup`, NO_BACKUP],
    ],
    0.9,
  ),
  ratio(
    `${FIXED}, raw, buffered: p99 against ours without a backup`,
    p99,
    [
      [`${FIXED}, raw, ${SLOW_BUFFERED}`, BUFFERED],
      [`${FIXED}, raw, no backup`, NO_BACKUP],
    ],
    2,
  ),
  atMost(
    `${FIXED}, raw, buffered: longest write, ms`,
    longest,
    [`${FIXED}, raw, ${SLOW_BUFFERED}`, BUFFERED],
    20,
  ),
  atMost(
    `${FIXED}, raw, buffered, from before the backup's start: longest write, ms`,
    longest,
    [`${FIXED}, raw, ${SLOW_BUFFERED}, from before its start`, BUFFERED],
    20,
  ),
  atMost("64 MiB, spill: longest write, ms", longest, [TOO_SMALL, "cowcatcher, 64 MiB, spill"], 50),
  ratio(
    "64 MiB, spill: IOPS against fleecing's",
    iops,
    [
      [TOO_SMALL, "cowcatcher, 64 MiB, spill"],
      [TOO_SMALL, FLEECING],
    ],
    1,
  ),
  atMost("64 MiB, wait: longest write, ms", longest, [TOO_SMALL, "cowcatcher, 64 MiB, wait"], 250),
  ratio(
    "direct, buffered: IOPS against fleecing's",
    iops,
    [
      [`${MAIN}, raw, direct, ${SLOW_BUFFERED}`, BUFFERED],
      [`${MAIN}, raw, direct, ${SLOW_BUFFERED}`, FLEECING],
    ],
    1.2,
  ),
  atMost(
    "direct, buffered: event loop held up, ms",
    ({ loopDelayMs }) => loopDelayMs,
    [`${MAIN}, raw, direct, ${SLOW_BUFFERED}`, BUFFERED],
    5,
  ),
];

/** "The backup itself finishes no later than QEMU's", for each cell that has both. */
function durationAims(results: Results): Aim[] {
  const seconds: Pick = ({ backupSeconds }) => backupSeconds;
  return results.contents.flatMap(({ cell, contestants }) => {
    const [qemu, ...others] = contestants;
    if (qemu === undefined || cell.endsWith("no backup")) return [];
    return others
      .filter((contestant) => contestant.startsWith("cowcatcher") && !contestant.endsWith("cancel"))
      .map((contestant) => ({
        name: `${cell}: time of the backup, ${contestant} against ${qemu}`,
        bound: SAME_TIME,
        isUpper: true,
        figure: () => ({
          median:
            results.figure(cell, contestant, seconds).median / results.figure(cell, qemu, seconds).median,
          worst: NaN,
        }),
      }));
  });
}

/** Of each cell with O_DIRECT that was measured (`--direct`). */
function directAims(results: Results): Aim[] {
  return results.contents.flatMap(({ cell, contestants }) => {
    if (!cell.includes(", direct, ")) return [];
    const [qemu] = contestants;
    if (qemu === undefined) return [];
    const isBuffered = cell.endsWith(SLOW_BUFFERED);
    const ours = isBuffered ? BUFFERED : NO_BACKUP;
    const places = [
      [cell, ours],
      [cell, qemu],
    ] as const;
    const threads = contestants.find((name) => name.endsWith(THREADS));
    return [
      ratio(`${cell}: IOPS against ${qemu}`, iops, places, isBuffered ? 1.3 : 1),
      atMost(`${cell}: event loop held up, ms`, ({ loopDelayMs }) => loopDelayMs, [cell, ours], 5),
      ...(threads === undefined
        ? []
        : [
            ratio(
              `${cell}: processor time a request against that without io_uring`,
              cpuPerRequest,
              [
                [cell, ours],
                [cell, threads],
              ],
              1,
            ),
          ]),
    ];
  });
}

/** "–" for what this run did not measure. */
export function aimsTable(cells: readonly CellResult[], { direct = false } = {}): string {
  const results = new Results(cells);
  const aims = direct ? directAims(results) : [...AIMS, ...durationAims(results)];
  const rows = aims.map(({ name, figure, bound, isUpper }) => {
    const { median, worst } = figure(results);
    const isMet = isUpper ? median <= bound : median >= bound;
    const verdict = Number.isFinite(median) ? (isMet ? "yes" : "no") : "–";
    return [name, `${isUpper ? "≤" : "≥"} ${bound}`, formatFigure(median), formatFigure(worst), verdict];
  });
  return markdownTable(["aim", "bound", "median", "worst round", "met"], rows);
}
