// npm run bench:tracking: what changed-block tracking costs. Needs fio, qemu-utils.
//
// The disks stand in a folder of the file system that --dir names: a log in memory costs nothing, and says nothing.

import { tmpdir } from "node:os";
import { parseArgs } from "node:util";
import { formatBytes, parseSize } from "../src/units.js";
import { runMain, say } from "./lib/children.js";
import { filterCells } from "./lib/guest-cells.js";
import { describeMachine, machineLine, ResultFolder } from "./lib/results.js";
import { markdownTable } from "./lib/statistics.js";
import {
  type GuestOptions,
  measureTrackingCell,
  TRACKING_CELLS,
  type TrackingResult,
  trackingTable,
} from "./lib/tracking-guest.js";
import {
  type IncrementalResult,
  measureIncremental,
  measureState,
  type StateResult,
} from "./lib/tracking-state.js";

const HELP = `npm run bench:tracking -- [options]
  --rounds N             interleaved rounds of off, process and host (7)
  --seconds N            of the guest in each (3)
  --size SIZE            of the disks (1G)
  --dir DIR              where the disks stand (the temporary folder)
  --cell "WORD WORD"     only cells whose name holds these words; may be repeated
  --quick                three rounds of 1 s of the first cells, disks of 256 MiB
  --only guest|state|incremental   one part
  --list                 names of the cells, and nothing else
  --out DIR              results: tracking.md, tracking.json (bench/results)`;

const START_SECONDS_MAX = 1;
const BYTES_PER_TIB_AND_EPOCH_MAX = 4 * 2 ** 20;
const INCREMENTAL_SHARE_MAX = 0.05;

const { values } = parseArgs({
  options: {
    rounds: { type: "string" },
    seconds: { type: "string" },
    size: { type: "string" },
    dir: { type: "string", default: tmpdir() },
    cell: { type: "string", multiple: true, default: [] },
    quick: { type: "boolean", default: false },
    only: { type: "string" },
    list: { type: "boolean", default: false },
    out: { type: "string", default: "bench/results" },
    help: { type: "boolean", default: false },
  },
});

async function bench(): Promise<number> {
  const cells = filterCells(values.quick ? TRACKING_CELLS.slice(0, 3) : TRACKING_CELLS, values.cell);
  if (values.help || values.list || cells.length === 0) {
    say(values.help ? HELP : cells.length === 0 ? "no cell has such a name" : "");
    for (const { name } of cells) if (values.list) say(name);
    return cells.length === 0 ? 1 : 0;
  }
  const wants = (part: string): boolean => values.only === undefined || values.only === part;
  const options: GuestOptions = {
    rounds: Number(values.rounds ?? (values.quick ? 3 : 7)),
    seconds: Number(values.seconds ?? (values.quick ? 1 : 3)),
    sizeBytes: parseSize(values.size ?? (values.quick ? "256M" : "1G"), "--size"),
    parent: values.dir,
  };
  const results = new ResultFolder(values.out);
  const machine = machineLine(await describeMachine());
  const disk = formatBytes(options.sizeBytes);
  const parts = [
    `${machine}. Disks of ${disk}, ${options.rounds} interleaved rounds of ${options.seconds} s, medians of the rounds' ratios.`,
  ];
  const guest: TrackingResult[] = [];
  if (wants("guest")) {
    for (const cell of cells) guest.push(await measureTrackingCell(cell, options));
    parts.push(trackingTable(guest));
  }
  const state = wants("state") ? await measureState(values.dir, values.quick ? 1 : 5) : undefined;
  if (state !== undefined) parts.push(stateTable(state));
  const incremental =
    wants("incremental") && !values.quick ? await measureIncremental(values.dir) : undefined;
  if (incremental !== undefined) parts.push(incrementalTable(incremental));
  results.write("tracking.json", { machine, options: values, guest, state, incremental });
  say(`\n${parts.join("\n\n")}\n\n${results.write("tracking.md", `${parts.join("\n\n")}\n`)}`);
  return 0;
}

function stateTable({ startSeconds, activeBytes, epochBytes, dirtyGranules }: StateResult): string {
  const seconds = (value: number): string => `${value.toFixed(2)} s`;
  const isQuick = (value: number): string => (value < START_SECONDS_MAX ? "met" : "missed");
  const isSmall = (bytes: number): string => (bytes <= BYTES_PER_TIB_AND_EPOCH_MAX ? "met" : "missed");
  const { withoutTracking, clean, killed, powerCut } = startSeconds;
  return markdownTable(
    ["a disk of 1 TiB", "", "aim"],
    [
      ["start without tracking", seconds(withoutTracking), ""],
      ["start after a clean end", seconds(clean), ""],
      ["start after kill -9", seconds(killed), isQuick(killed)],
      ["start after a power cut", seconds(powerCut), isQuick(powerCut)],
      ["file of the active epoch", formatBytes(activeBytes), isSmall(activeBytes)],
      ["largest file of an epoch that is over", formatBytes(epochBytes), isSmall(epochBytes)],
      ["64 KiB granules that count as changed then", String(dirtyGranules), ""],
    ],
  );
}

function incrementalTable({ full, empty, incremental }: IncrementalResult): string {
  const share = (incremental - empty) / full;
  return markdownTable(
    ["a disk of 4 GiB", "seconds", "of a full one"],
    [
      ["full", full.toFixed(2), ""],
      ["nothing has changed: the start", empty.toFixed(2), ""],
      ["1 % has changed, scattered", incremental.toFixed(2), ""],
      [
        "the same without the start",
        (incremental - empty).toFixed(2),
        `${share.toFixed(3)} (${share <= INCREMENTAL_SHARE_MAX ? "met" : "missed"})`,
      ],
    ],
  );
}

await runMain("bench:tracking", bench);
