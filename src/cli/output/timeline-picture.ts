// A guest's writes over time, drawn with characters: one picture a phase, all of one scale, so that they can be compared.
//
//   unbuffered
//     21,400 ▇█
//            ██                  ▅█
//          0 ██▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁██
//              └T0               └end 20.5 s
import type { PhaseResult } from "../../bench/benchmark.js";
import { ratesOf, type TimelineFigures } from "../../bench/timeline.js";
import { formatDuration } from "../../units.js";
import { coloured } from "./colour.js";

const ROWS = 4;
/** Eighths of a character's height, from none to all. */
const EIGHTHS = [..." ▁▂▃▄▅▆▇█"];
const MAX_COLUMNS = 80;

/** @param columns of the terminal */
export function timelinePictures(
  results: readonly PhaseResult[],
  { columns, isColoured }: { columns: number; isColoured: boolean },
): string[] {
  const width = Math.min(columns, MAX_COLUMNS);
  const scale = Math.max(1, ...results.flatMap(({ timeline }) => ratesOf(timeline, width)));
  const label = Math.round(scale).toLocaleString("en-US");
  const indent = label.length + 3;
  const count = Math.max(10, width - indent - 1);
  return [
    "Writes a second:",
    ...results.flatMap(({ name, timeline }) => [
      name,
      ...rowsOf(timeline, { count, scale, label, isColoured }),
      ...marks(timeline, count, indent),
    ]),
  ];
}

interface Drawing {
  count: number;
  scale: number;
  label: string;
  isColoured: boolean;
}

function rowsOf(timeline: TimelineFigures, { count, scale, label, isColoured }: Drawing): string[] {
  const heights = ratesOf(timeline, count).map((rate) => levelOf(rate, scale));
  const [from, to] = [columnOf(timeline.t0Ms, timeline, count), columnOf(timeline.endMs, timeline, count)];
  return Array.from({ length: ROWS }, (_, row) => {
    const below = (ROWS - 1 - row) * 8;
    const text = heights.map((height) => EIGHTHS[Math.min(8, Math.max(0, height - below))] ?? " ").join("");
    const name = row === 0 ? label : row === ROWS - 1 ? "0" : "";
    const isMarked = timeline.t0Ms !== undefined;
    // During the backup.
    const [before, during, after] = isMarked
      ? [text.slice(0, from), text.slice(from, to), text.slice(to)]
      : [text, "", ""];
    return `  ${name.padStart(label.length)} ${before}${coloured(during, "cyan", isColoured)}${after}`.trimEnd();
  });
}

/** In eighths of a row; what is more than nothing is seen. */
function levelOf(rate: number, scale: number): number {
  return rate <= 0 ? 0 : Math.max(1, Math.round((rate / scale) * ROWS * 8));
}

function columnOf(ms: number | undefined, { lengthMs }: TimelineFigures, count: number): number {
  return ms === undefined ? count : Math.min(count, Math.floor((ms / Math.max(lengthMs, 1)) * count));
}

/** Below the picture; none where there was no backup. */
function marks(timeline: TimelineFigures, count: number, indent: number): string[] {
  const { t0Ms, endMs } = timeline;
  if (t0Ms === undefined) return [];
  let line = " ".repeat(indent + columnOf(t0Ms, timeline, count)) + "└T0";
  if (endMs !== undefined) {
    const text = `└end, ${formatDuration(endMs - t0Ms)}`;
    const column = indent + columnOf(endMs, timeline, count);
    // At the right edge its text stands before the mark.
    const isAtEdge = column + text.length > indent + count;
    const piece = isAtEdge ? `${text.slice(1)}┘` : text;
    const start = isAtEdge ? column - piece.length + 1 : column;
    if (start > line.length) line = line.padEnd(start) + piece;
  }
  return [line];
}
