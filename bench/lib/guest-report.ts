// The guest benchmark's table and picture.

import type { Cell } from "./guest-cells.js";
import type { Measurement } from "./measure-guest.js";
import { formatFigure, markdownTable, medianOf } from "./statistics.js";
import { lineChart } from "../../src/bench/line-chart.js";

export interface CellResult {
  name: string;
  /** The first is what the others are compared with. */
  contestants: { name: string; measurements: Measurement[] }[];
}

const HEADER = [
  "cell",
  "IOPS",
  "× QEMU",
  "mean ms",
  "p99 ms",
  "longest ms",
  "CPU s",
  "backup s",
  "× QEMU",
  "loop ms",
];

export function guestTable(cells: readonly CellResult[]): string {
  const rows = cells.flatMap(({ name, contestants }) => {
    const base = contestants[0];
    const baseIops = medianOf(base?.measurements ?? [], ({ iops }) => iops);
    const baseSeconds = medianOf(base?.measurements ?? [], ({ backupSeconds }) => backupSeconds);
    const title = [`**${name}**`, ...HEADER.slice(1).map(() => "")];
    return [
      title,
      ...contestants.map((contestant) => {
        const figure = (pick: (measurement: Measurement) => number | undefined): number =>
          medianOf(contestant.measurements, pick);
        const isBase = contestant === base;
        const iops = figure(({ iops }) => iops);
        const seconds = figure(({ backupSeconds }) => backupSeconds);
        return [
          contestant.name,
          formatFigure(iops),
          isBase ? "1" : formatFigure(iops / baseIops),
          formatFigure(figure(({ meanMs }) => meanMs)),
          formatFigure(figure(({ p99Ms }) => p99Ms)),
          formatFigure(figure(({ longestMs }) => longestMs)),
          formatFigure(figure(({ cpuSeconds }) => cpuSeconds)),
          formatFigure(seconds),
          isBase && Number.isFinite(seconds) ? "1" : formatFigure(seconds / baseSeconds),
          formatFigure(figure(({ loopDelayMs }) => loopDelayMs)),
        ];
      }),
    ];
  });
  return markdownTable(HEADER, rows);
}

export function timelineChart(
  cell: Cell,
  lines: readonly { name: string; measurement: Measurement }[],
): string {
  const series = lines.map(({ name, measurement }) => ({
    name,
    points: measurement.series.map(({ seconds, iops }) => ({ x: seconds, y: iops })),
    marks: measurement.marks,
  }));
  const title = `Guest: ${cell.pattern.name}; backup to a target of ${cell.throttle.name} (dashed: its start and end)`;
  return lineChart(title, "seconds", "guest IOPS", series);
}
