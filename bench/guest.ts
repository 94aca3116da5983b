// npm run bench:guest: what a guest's writes cost with no backup, an unbuffered one and a buffered one, beside
// qemu-storage-daemon in the same run. Needs fio, qemu-utils and nbdkit.
//
// Rounds are interleaved: each goes through all cells and, within a cell, through all contestants, in turned order,
// so that whatever else the machine does falls on all of them. Figures are medians over the rounds.

import { availableParallelism, tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { parseSize } from "../src/units.js";
import { runMain, runProgram, say, scratchFolder } from "./lib/children.js";
import type { DiskFormat } from "./lib/contestant.js";
import { startCowcatcher } from "./lib/cowcatcher.js";
import { convertDisk, makeRawDisk } from "./lib/disks.js";
import {
  aimCells,
  allCells,
  directMatrix,
  filterCells,
  quickCells,
  timelineCell,
  usualCells,
  wholeBackupCells,
  type Cell,
} from "./lib/guest-cells.js";
import { aimsTable } from "./lib/guest-aims.js";
import { guestTable, timelineChart, type CellResult } from "./lib/guest-report.js";
import {
  describeMeasurement,
  measure,
  measureTimeline,
  type Measurement,
  type MeasureOptions,
  WARM_UP_SECONDS,
} from "./lib/measure-guest.js";
import { wholeBackupTable, type WholeBackup } from "./lib/whole-backup.js";
import { describeMachine, machineLine, ResultFolder } from "./lib/results.js";

const HELP = `npm run bench:guest -- [options]
  --rounds N             interleaved rounds (5)
  --seconds N            of the guest in each measurement (5)
  --size SIZE            of the disk (1G)
  --dir DIR              where disk and target stand (the temporary folder)
  --cell "WORD WORD"     only cells whose name holds these words; may be repeated
  --only WORD            only contestants whose name holds this word
  --without WORD         none whose name holds this word
  --aims                 the cells of the project's aims, and whether they are met (5 rounds: 40 minutes)
  --direct               O_DIRECT on a real file system: depths and sizes, with and without a backup, beside fio on the
                         file; and whether the aims are met. Name --dir on a disk: on tmpfs it means nothing
  --all                  every combination, not only the usual ones (hours)
  --quick                one round, randwrite 32k on raw
  --whole                instead of cells: the guest over whole buffered backups, against the seconds after them
  --timeline SECONDS     length of the picture's run (45; with --quick, --aims or --direct 0: none)
  --backup-timeout N     seconds that a backup gets after the guest is done (120)
  --ends N               rounds in which backups run to their end; in later ones they are cancelled (all)
  --list                 names of the cells, and nothing else
  --out DIR              results: guest.md, guest.json, guest.svg (bench/results)`;

const TIMELINE_LEAD_SECONDS = 5;
/** A whole backup of 1 GiB at 50 MiB/s, what comes before it, and the reference after it. */
const WHOLE_BACKUP_SECONDS = 35;

const { values } = parseArgs({
  options: {
    rounds: { type: "string" },
    seconds: { type: "string", default: "5" },
    size: { type: "string", default: "1G" },
    dir: { type: "string", default: tmpdir() },
    cell: { type: "string", multiple: true, default: [] },
    only: { type: "string", default: "" },
    without: { type: "string" },
    aims: { type: "boolean", default: false },
    direct: { type: "boolean", default: false },
    all: { type: "boolean", default: false },
    quick: { type: "boolean", default: false },
    whole: { type: "boolean", default: false },
    timeline: { type: "string" },
    "backup-timeout": { type: "string", default: "120" },
    ends: { type: "string" },
    list: { type: "boolean", default: false },
    out: { type: "string", default: "bench/results" },
    help: { type: "boolean", default: false },
  },
});

async function bench(): Promise<number> {
  let cells = filterCells(candidates(), values.cell);
  if (values.list || values.help || cells.length === 0) {
    say(values.help ? HELP : cells.length === 0 ? "no cell has such a name" : "");
    for (const { name } of cells) if (values.list) say(name);
    return cells.length === 0 ? 1 : 0;
  }
  const results = new ResultFolder(values.out);
  const folder = scratchFolder(values.dir);
  const needsDelay = cells.some(({ throttle }) => throttle.writeDelayMs !== undefined);
  if (needsDelay && !(await honoursFaults(folder))) {
    say("cowcatcher does not honour COWCATCHER_FAULTS: cells with a slow write are left out");
    cells = cells.filter(({ throttle }) => throttle.writeDelayMs === undefined);
  }
  const machine = await describeMachine();
  say(`${machineLine(machine)}\n${cells.length} cells`);
  const disks = await makeDisks(folder);
  const rounds = Number(values.rounds ?? (values.quick ? 1 : 5));
  const ends = Number(values.ends ?? rounds);
  const options = (format: DiskFormat, round = 0): MeasureOptions => ({
    disk: disks[format],
    folder,
    guestSeconds: Number(values.seconds),
    backupTimeoutSeconds: round < ends ? Number(values["backup-timeout"]) : 0,
  });
  if (values.whole) return measureWholeBackups(results, rounds, options);
  const cellResults: CellResult[] = cells.map((cell) => ({
    name: cell.name,
    contestants: cell.contestants.map(({ name }) => ({ name, measurements: [] })),
  }));
  for (let round = 0; round < rounds; round++) {
    say(`round ${round + 1} of ${rounds}`);
    for (const [index, cell] of cells.entries()) {
      const result = cellResults[index];
      if (result !== undefined) await measureCell(cell, result, round, options(cell.format, round));
    }
    results.write("guest.json", { machine, options: values, cells: cellResults });
  }
  const timelineSeconds = Number(values.timeline ?? (values.quick || values.aims || values.direct ? 0 : 45));
  if (timelineSeconds > 0) await drawTimeline(results, { ...options("raw"), guestSeconds: timelineSeconds });
  const header = `${machineLine(machine)}. ${rounds} interleaved rounds of ${values.seconds} s, disk ${values.size}, medians. A backup that took less than the guest's time weighed on a part of it only.`;
  const table = guestTable(cellResults);
  const parts = [
    table,
    ...(values.aims || values.direct ? [aimsTable(cellResults, { direct: values.direct })] : []),
  ];
  const path = results.write("guest.md", `${[header, ...parts].join("\n\n")}\n`);
  say(`\n${parts.join("\n\n")}\n\n${path}`);
  return 0;
}

function candidates(): Cell[] {
  return everyCell().map((cell) => ({
    ...cell,
    contestants: cell.contestants.filter(
      ({ name }) =>
        name.includes(values.only) && (values.without === undefined || !name.includes(values.without)),
    ),
  }));
}

function everyCell(): Cell[] {
  if (values.quick) return quickCells();
  if (values.aims) return aimCells();
  if (values.direct) return directMatrix();
  return values.all ? allCells() : usualCells();
}

async function measureCell(
  cell: Cell,
  result: CellResult,
  round: number,
  options: MeasureOptions,
): Promise<void> {
  const count = cell.contestants.length;
  for (let turn = 0; turn < count; turn++) {
    const at = (turn + round) % count;
    const contestant = cell.contestants[at];
    const measurements = result.contestants[at]?.measurements;
    if (contestant === undefined || measurements === undefined) continue;
    const measurement = cell.throughStart
      ? await measureTimeline(cell, contestant, options, WARM_UP_SECONDS)
      : await measure(cell, contestant, options);
    measurements.push(measurement);
    say(`  ${cell.name}: ${contestant.name}: ${describeMeasurement(measurement)}`);
  }
}

async function measureWholeBackups(
  results: ResultFolder,
  rounds: number,
  options: (format: DiskFormat) => MeasureOptions,
): Promise<number> {
  const cells = filterCells(wholeBackupCells(), values.cell);
  const found: WholeBackup[] = cells.flatMap((cell) =>
    cell.contestants.map(({ name }) => ({ cell: cell.name, contestant: name, measurements: [] })),
  );
  for (let round = 0; round < rounds; round++) {
    for (const cell of cells) {
      for (const contestant of cell.contestants) {
        const measurement = await measureTimeline(
          cell,
          contestant,
          { ...options(cell.format), guestSeconds: WHOLE_BACKUP_SECONDS },
          TIMELINE_LEAD_SECONDS,
        );
        const entry = found.find((each) => each.cell === cell.name && each.contestant === contestant.name);
        entry?.measurements.push(measurement);
        say(`  ${cell.name}: ${contestant.name}: ${describeMeasurement(measurement)}`);
      }
    }
  }
  const table = wholeBackupTable(found);
  results.write("guest-whole.json", found);
  say(`\n${table}\n\n${results.write("guest-whole.md", `${table}\n`)}`);
  return 0;
}

async function drawTimeline(results: ResultFolder, options: MeasureOptions): Promise<void> {
  const cell = timelineCell();
  const lines: { name: string; measurement: Measurement }[] = [];
  for (const contestant of cell.contestants) {
    say(`timeline: ${contestant.name}`);
    const measurement = await measureTimeline(cell, contestant, options, TIMELINE_LEAD_SECONDS);
    lines.push({ name: contestant.name, measurement });
  }
  results.write("guest-timeline.json", lines);
  say(results.write("guest.svg", timelineChart(cell, lines)));
}

async function makeDisks(folder: string): Promise<Record<DiskFormat, string>> {
  const disks = { raw: join(folder, "disk.raw"), qcow2: join(folder, "disk.qcow2") };
  makeRawDisk(disks.raw, parseSize(values.size, "--size"));
  await convertDisk(disks.raw, disks.qcow2, "qcow2");
  await runProgram("sync", ["-f", folder]);
  return disks;
}

/** Whether a delay that is asked for makes a tiny copy last that long. */
async function honoursFaults(folder: string): Promise<boolean> {
  const [source, target] = [join(folder, "probe.raw"), join(folder, "probe-copy.raw")];
  makeRawDisk(source, 65_536);
  const env = { ...process.env, COWCATCHER_FAULTS: "target-write:delay=2s" };
  const startMs = performance.now();
  const { code } = await startCowcatcher(["backup", source, target, "-q"], { env }).ended;
  return code === 0 && performance.now() - startMs >= 2000;
}

if (availableParallelism() < 2) say("note: on one core, guest and server share it");
await runMain("bench:guest", bench);
