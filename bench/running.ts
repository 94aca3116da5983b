// npm run bench:running: what a backup costs a guest that QEMU runs. One qemu-storage-daemon, fio over its own export as the
// guest, a target held to 50 MiB a second: QEMU's own ways beside ours by each method. Needs fio, qemu-utils.
//
// Rounds are interleaved, and compared are the ratios of one round: see guest.ts. A run may go on where another one ended
// (--continue), so that a busy machine can be had for minutes at a time.

import { existsSync, readFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { MiB, parseSize } from "../src/units.js";
import { runMain, runProgram, say, scratchFolder } from "./lib/children.js";
import { makeRawDisk } from "./lib/disks.js";
import { type Cell, filterCells, SLOW_TARGET } from "./lib/guest-cells.js";
import type { CellResult } from "./lib/guest-report.js";
import { describeMeasurement, measure } from "./lib/measure-guest.js";
import { qemu, type QemuTuning } from "./lib/qemu.js";
import { describeMachine, machineLine, ResultFolder } from "./lib/results.js";
import { ours } from "./lib/running-ours.js";
import { aimsTable, type Rivals, runningAims, runningTable } from "./lib/running-report.js";

const HELP = `npm run bench:running -- [options]
  --rounds N             interleaved rounds (5)
  --seconds N            of the guest in each measurement, from T0 on (5)
  --size SIZE            of the disk (1G)
  --dir DIR              where disk, target and old data stand (the temporary folder)
  --cell "WORD WORD"     only guests whose name holds these words; may be repeated
  --only "WORD WORD"     only contestants whose name holds these words; may be repeated
  --ends N               rounds in which backups run to their end; in later ones they are cancelled after the guest (1)
  --quick                one round of two seconds, a disk of 256 MiB, nothing runs to its end
  --continue             add to the results of an earlier run in --out
  --list                 names of guests and contestants, and nothing else
  --out DIR              results: running.md, running.json (bench/results)`;

/** A little under the target's rate, so that QEMU's own copying does not fill the way to it. */
const TUNED_SPEED = 45 * MiB;
const WORKERS = [1, 4];
const tunings: QemuTuning[] = WORKERS.map((workerCount) => ({
  name: `${workerCount} workers, ${TUNED_SPEED / MiB} MiB/s`,
  workerCount,
  speed: TUNED_SPEED,
}));

const FLEECING = qemu("fleecing");
const TUNED = tunings.map((tuning) => qemu("plain", tuning));
/** As much memory as this project began with, and the default, 256 MiB. */
const LARGE = { name: "1 GiB of buffer", args: ["--cow-buffer-size", "1G"] };
const USUAL = { name: "", args: [] };
const OURS = [ours("ring", LARGE), ours("filter", LARGE)];
const OURS_USUAL = [ours("ring", USUAL), ours("filter", USUAL)];
const CONTESTANTS = [qemu("none"), qemu("plain"), ...TUNED, FLEECING, qemu("pulled"), ...OURS, ...OURS_USUAL];
const RIVALS: Rivals = {
  fleecing: FLEECING.name,
  tuned: TUNED.map(({ name }) => name),
  ours: [...OURS, ...OURS_USUAL].map(({ name }) => name),
};

const COMMON = { format: "raw", throttle: SLOW_TARGET, direct: false, throughStart: false } as const;
const WRITES = { rw: "randwrite", blockSize: "32k", ioDepth: 8 } as const;
/** As fast as it can; and so many that old data comes slower (at 64 KiB each) than the target takes it. */
const GUESTS: Cell[] = [
  { ...COMMON, name: "randwrite 32k qd8", pattern: { name: "full", ...WRITES }, contestants: CONTESTANTS },
  {
    ...COMMON,
    name: "500/s 32k",
    pattern: { name: "500/s", ...WRITES, ratePerSecond: 500 },
    contestants: CONTESTANTS,
  },
];

const { values } = parseArgs({
  options: {
    rounds: { type: "string" },
    seconds: { type: "string" },
    size: { type: "string" },
    dir: { type: "string", default: tmpdir() },
    cell: { type: "string", multiple: true, default: [] },
    only: { type: "string", multiple: true, default: [] },
    ends: { type: "string" },
    quick: { type: "boolean", default: false },
    continue: { type: "boolean", default: false },
    list: { type: "boolean", default: false },
    out: { type: "string", default: "bench/results" },
    help: { type: "boolean", default: false },
  },
});
const BACKUP_TIMEOUT_SECONDS = 120;

async function bench(): Promise<number> {
  const cells = filterCells(GUESTS, values.cell).map((cell) => ({
    ...cell,
    contestants: filterCells(cell.contestants, values.only),
  }));
  const isEmpty = cells.every(({ contestants }) => contestants.length === 0);
  if (values.help || values.list || isEmpty) {
    if (values.help || isEmpty) say(values.help ? HELP : "no guest or contestant has such a name");
    else
      for (const { name, contestants } of cells)
        say([name, ...contestants.map((one) => one.name)].join("\n  "));
    return isEmpty ? 1 : 0;
  }
  const results = new ResultFolder(values.out);
  const machine = await describeMachine();
  say(machineLine(machine));
  const folder = scratchFolder(values.dir);
  const disk = join(folder, "disk.raw");
  const size = values.size ?? (values.quick ? "256M" : "1G");
  makeRawDisk(disk, parseSize(size, "--size"));
  await runProgram("sync", ["-f", folder]);
  const found = values.continue ? earlier(join(results.path, "running.json")) : [];
  const [rounds, seconds] = [
    Number(values.rounds ?? (values.quick ? 1 : 5)),
    Number(values.seconds ?? (values.quick ? 2 : 5)),
  ];
  const ends = Number(values.ends ?? (values.quick ? 0 : 1));
  for (let round = 0; round < rounds; round++) {
    say(`round ${round + 1} of ${rounds}`);
    const backupTimeoutSeconds = round < ends ? BACKUP_TIMEOUT_SECONDS : 0;
    for (const cell of cells) {
      await measureRound(cell, resultOf(found, cell), {
        disk,
        folder,
        guestSeconds: seconds,
        backupTimeoutSeconds,
      });
    }
    results.write("running.json", { machine, options: values, cells: found });
  }
  const measured = found.filter((cell) => GUESTS.some(({ name }) => name === cell.name));
  const aims = measured.flatMap((cell) => runningAims(cell, RIVALS, hasLimit(cell)));
  const header = `${machineLine(machine)}. Disk ${size}, target held to 50 MiB/s, the guest for ${seconds} s from T0 on; medians.`;
  const parts = [...measured.map(runningTable), aimsTable(aims)];
  say(`\n${parts.join("\n\n")}\n\n${results.write("running.md", [header, ...parts].join("\n\n"))}`);
  return 0;
}

function hasLimit({ name }: CellResult): boolean {
  return GUESTS.find((guest) => guest.name === name)?.pattern.ratePerSecond !== undefined;
}

/** Each round begins with another contestant. */
async function measureRound(
  cell: Cell,
  result: CellResult,
  options: Parameters<typeof measure>[2],
): Promise<void> {
  const count = cell.contestants.length;
  const round = result.contestants[0]?.measurements.length ?? 0;
  for (let turn = 0; turn < count; turn++) {
    const contestant = cell.contestants[(turn + round) % count];
    if (contestant === undefined) continue;
    const measurement = await measure(cell, contestant, options);
    result.contestants.find(({ name }) => name === contestant.name)?.measurements.push(measurement);
    say(`  ${cell.name}: ${contestant.name}: ${describeMeasurement(measurement)}`);
  }
}

function resultOf(found: CellResult[], { name }: Cell): CellResult {
  const known = found.find((cell) => cell.name === name);
  if (known !== undefined) return known;
  const made = { name, contestants: CONTESTANTS.map((one) => ({ name: one.name, measurements: [] })) };
  found.push(made);
  return made;
}

function earlier(path: string): CellResult[] {
  if (!existsSync(path)) return [];
  return (JSON.parse(readFileSync(path, "utf8")) as { cells: CellResult[] }).cells;
}

await runMain("bench:running", bench);
