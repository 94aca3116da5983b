// npm run bench:repo: backups into a repository beside restic and borg, on one disk, in one run. Needs both, and qemu-io. And
// what large repositories cost (--only scale; lib/repository-scale.ts), which needs nothing.
//
// Each does what it does by default with encryption, which restic always has: restic with its default compression, borg
// with repokey (lz4), cowcatcher with a key file (zstd). Disks are in the page cache; each repository is in a folder beside
// the disk, and each tool syncs what it writes. The steps:
//
//   first     the whole disk
//   second    1 % of it has changed, in places of 64 KiB, evenly spread: read and hashed, what is new is stored
//   tracked   the same of cowcatcher alone, from a server that knows what has changed (serve, backup --control)
//   restore   the second backup into a new file, which is synced within the time and compared with the disk
//
// Peak memory is that of the tool's process (lib/timed-program.ts).

import { closeSync, fsyncSync, openSync, rmSync, writeFileSync, writeSync } from "node:fs";
import { randomBytes } from "node:crypto";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { CowcatcherError } from "../src/errors.js";
import { MiB, parseSize } from "../src/units.js";
import { runMain, runProgram, say, scratchFolder } from "./lib/children.js";
import { startServe } from "./lib/cowcatcher.js";
import { makeRawDisk } from "./lib/disks.js";
import { measureScale } from "./lib/repository-scale.js";
import { describeMachine, machineLine, ResultFolder } from "./lib/results.js";
import { formatFigure, markdownTable, median } from "./lib/statistics.js";
import { ours, peakOf, type Run, type Taken, timed } from "./lib/timed-program.js";

const HELP = `npm run bench:repo -- [options]
  --rounds N   rounds (3)
  --size SIZE  of the disk (4G)
  --dir DIR    where disk and repositories stand (the temporary folder)
  --quick      one round, 512M; of the large repository a hundredth
  --only PART  beside (restic and borg) or scale (both)
  --content C  incompressible or half (both)
  --contestants NAMES
               some of restic,borg,cowcatcher (all): a table has ratios only with all of them
  --chunk-size SIZE
               of our repositories (as repo init has it)
  --out DIR    results: repo.md, repo.json, repo-scale.md (bench/results)`;

const STEPS = ["first", "second", "tracked", "restore"] as const;
type Step = (typeof STEPS)[number];
const OURS = "cowcatcher";
const CONTENTS = ["incompressible", "half compressible"] as const;
/** The share of the disk that changes, and the unit in which it does. */
const CHANGED_SHARE = 0.01;
const CHANGE_BYTES = 64 * 1024;

interface Place {
  disk: string;
  /** A folder of the contestant's own. */
  folder: string;
  restored: string;
}

interface Contestant {
  name: string;
  env(folder: string): Record<string, string>;
  init(place: Place): Run;
  backup(place: Place): Run;
  restore(place: Place): Run;
  /** Where the restored disk stands. */
  restored(place: Place): string;
}

let backupCount = 0;

const OTHERS: readonly Contestant[] = [
  {
    name: "restic",
    env: (folder) => ({
      RESTIC_PASSWORD: "bench",
      RESTIC_REPOSITORY: join(folder, "repo"),
      RESTIC_CACHE_DIR: join(folder, "cache"),
    }),
    init: () => ({ program: "restic", args: ["init", "-q"] }),
    backup: ({ disk }) => ({ program: "restic", args: ["backup", "-q", disk] }),
    restore: ({ folder }) => ({
      program: "restic",
      args: ["restore", "-q", "latest", "--target", join(folder, "out")],
    }),
    restored: ({ folder, disk }) => join(folder, "out", disk),
  },
  {
    name: "borg",
    env: (folder) => ({
      BORG_PASSPHRASE: "bench",
      BORG_REPO: join(folder, "repo"),
      BORG_BASE_DIR: join(folder, "base"),
    }),
    init: () => ({ program: "borg", args: ["init", "-e", "repokey"] }),
    backup: ({ disk }) => ({ program: "borg", args: ["create", `::b${++backupCount}`, disk] }),
    restore: ({ folder }) => ({ program: "borg", args: ["extract", `::b${backupCount}`], cwd: folder }),
    restored: ({ folder, disk }) => join(folder, disk),
  },
];

function ourselves(chunkSize: string | undefined): Contestant {
  return {
    name: OURS,
    env: (folder) => ({ COWCATCHER_KEY_FILE: join(folder, "key") }),
    init: ({ folder }) => ourInit(folder, chunkSize),
    backup: ({ disk, folder }) => ours("backup", disk, "-q", "--repo", join(folder, "repo"), "--group", "vm"),
    restore: ({ folder, restored }) => ours("restore", "-q", `${join(folder, "repo")}::vm`, restored),
    restored: ({ restored }) => restored,
  };
}

function ourInit(folder: string, chunkSize: string | undefined): Run {
  const size = chunkSize === undefined ? [] : ["--chunk-size", chunkSize];
  const key = ["--key-file", join(folder, "key"), "--new-key-file"];
  return ours("repo", "init", join(folder, "repo"), ...key, ...size);
}

/** @throws CowcatcherError USAGE */
function chosen(names: string | undefined, chunkSize: string | undefined): Contestant[] {
  const all = [...OTHERS, ourselves(chunkSize)];
  return (names?.split(",") ?? all.map(({ name }) => name)).map((name) => {
    const found = all.find((contestant) => contestant.name === name);
    if (found !== undefined) return found;
    const hint = `give some of ${all.map((contestant) => contestant.name).join(",")}`;
    throw new CowcatcherError({ code: "USAGE", object: "--contestants", problem: `'${name}' is none`, hint });
  });
}

interface Figures {
  seconds: number[];
  peakBytes: number;
}

interface Cell {
  content: string;
  figures: Map<string, Map<Step, Figures>>;
}

async function bench(): Promise<number> {
  const { values } = parseArgs({
    options: {
      rounds: { type: "string" },
      size: { type: "string" },
      dir: { type: "string", default: tmpdir() },
      quick: { type: "boolean", default: false },
      only: { type: "string" },
      content: { type: "string" },
      contestants: { type: "string" },
      "chunk-size": { type: "string" },
      out: { type: "string", default: "bench/results" },
      help: { type: "boolean", default: false },
    },
  });
  if (values.help) {
    say(HELP);
    return 0;
  }
  const { only } = values;
  if (only !== undefined && only !== "beside" && only !== "scale") {
    const problem = `'${only}' is no part`;
    throw new CowcatcherError({ code: "USAGE", object: "--only", problem, hint: "give beside or scale" });
  }
  const machine = machineLine(await describeMachine());
  const results = new ResultFolder(values.out);
  if (only !== "beside") {
    const scale = await measureScale(scratchFolder(values.dir), values);
    results.write("repo-scale.md", `${machine}\n\n${scale}`);
    say(scale);
  }
  if (only === "scale") return 0;
  const rounds = Number(values.rounds ?? (values.quick ? 1 : 3));
  const sizeBytes = parseSize(values.size ?? (values.quick ? "512M" : "4G"), "--size");
  const contestants = chosen(values.contestants, values["chunk-size"]);
  const hasOurs = contestants.some(({ name }) => name === OURS);
  const versions = await Promise.all(["restic", "borg"].map(versionOf));
  const cells: Cell[] = [];
  for (const content of CONTENTS) {
    if (values.content !== undefined && !content.startsWith(values.content)) continue;
    const cell: Cell = { content, figures: new Map() };
    cells.push(cell);
    for (let round = 0; round < rounds; round++) {
      for (let turn = 0; turn < contestants.length; turn++) {
        const contestant = contestants[(turn + round) % contestants.length];
        if (contestant !== undefined) await measure(cell, contestant, sizeBytes, values.dir);
      }
      if (hasOurs) await measureTracked(cell, sizeBytes, values.dir, values["chunk-size"]);
      const title = `${sizeBytes / MiB} MiB, ${round + 1} of ${rounds} rounds. ${machine}, ${versions.join(", ")}`;
      results.write("repo.md", `${title}\n\n${cells.map(table).join("\n\n")}`);
      results.write("repo.json", { machine, versions, sizeBytes, cells: cells.map(toJson) });
    }
  }
  say(cells.map(table).join("\n\n"));
  return 0;
}

async function versionOf(program: string): Promise<string> {
  const { stdout } = await runProgram(program, [program === "borg" ? "--version" : "version"]);
  return stdout.trim().split(" ").slice(0, 2).join(" ");
}

async function measure(cell: Cell, contestant: Contestant, sizeBytes: number, dir: string): Promise<void> {
  const folder = scratchFolder(dir);
  const place = { disk: join(folder, "disk.img"), folder, restored: join(folder, "restored.img") };
  const env = contestant.env(folder);
  makeDisk(place.disk, cell.content, sizeBytes);
  await timed(contestant.init(place), env);
  note(cell, contestant.name, "first", await timed(contestant.backup(place), env));
  change(place.disk, sizeBytes);
  note(cell, contestant.name, "second", await timed(contestant.backup(place), env));
  const restored = contestant.restored(place);
  note(cell, contestant.name, "restore", await timed(contestant.restore(place), env, restored));
  await runProgram("cmp", [place.disk, restored]);
  rmSync(folder, { recursive: true });
}

/** What a server knows to have changed: written to by a guest, between two live backups. */
async function measureTracked(
  cell: Cell,
  sizeBytes: number,
  dir: string,
  chunkSize: string | undefined,
): Promise<void> {
  const folder = scratchFolder(dir);
  const [disk, socket, control] = ["disk.img", "nbd.sock", "control.sock"].map((name) => join(folder, name));
  const key = { COWCATCHER_KEY_FILE: join(folder, "key") };
  makeDisk(disk, cell.content, sizeBytes);
  await timed(ourInit(folder, chunkSize), {});
  const server = await startServe({ image: disk, format: "raw", socket, control, env: key });
  const backup = ours("backup", "-q", "--control", control, "--repo", join(folder, "repo"), "--group", "vm");
  await timed(backup, key);
  const writes = [...places(sizeBytes)].map((at) => {
    const content = join(folder, `change-${at}`);
    writeFileSync(content, randomBytes(CHANGE_BYTES));
    return `write -q -s ${content} ${at} ${CHANGE_BYTES}`;
  });
  // One argument list holds them: 1 % of 4 GiB are 655 places.
  const commands = [...writes, "flush"].flatMap((command) => ["-c", command]);
  await runProgram("qemu-io", ["-f", "raw", ...commands, `nbd+unix:///disk?socket=${socket}`]);
  const taken = await timed(backup, key);
  note(cell, OURS, "tracked", { ...taken, peakBytes: peakOf(server.process.pid) });
  await server.stop();
  rmSync(folder, { recursive: true });
}

function makeDisk(path: string, content: string, sizeBytes: number): void {
  makeRawDisk(path, sizeBytes, 1);
  if (content === "incompressible") return;
  const fd = openSync(path, "r+");
  const text = Buffer.alloc(MiB, "The guest goes first; a backup is a slow target's business. ");
  for (let at = 0; at < sizeBytes; at += 2 * MiB) writeSync(fd, text, 0, text.length, at);
  closeSync(fd);
}

function* places(sizeBytes: number): Generator<number, void, void> {
  const count = Math.floor((sizeBytes * CHANGED_SHARE) / CHANGE_BYTES);
  const stride = Math.floor(sizeBytes / count / CHANGE_BYTES) * CHANGE_BYTES;
  for (let index = 0; index < count; index++) yield index * stride;
}

function change(disk: string, sizeBytes: number): void {
  const fd = openSync(disk, "r+");
  for (const at of places(sizeBytes)) writeSync(fd, randomBytes(CHANGE_BYTES), 0, CHANGE_BYTES, at);
  fsyncSync(fd);
  closeSync(fd);
}

function note({ content, figures }: Cell, name: string, step: Step, { seconds, peakBytes }: Taken): void {
  const steps = figures.get(name) ?? new Map<Step, Figures>();
  figures.set(name, steps);
  const known = steps.get(step) ?? { seconds: [], peakBytes: 0 };
  steps.set(step, { seconds: [...known.seconds, seconds], peakBytes: Math.max(known.peakBytes, peakBytes) });
  say(
    `  ${content}: ${name}: ${step}: ${seconds.toFixed(2)} s, ${Math.round(peakBytes / MiB)} MiB of memory`,
  );
}

function table({ content, figures }: Cell): string {
  const secondsOf = (name: string, step: Step): number => median(figures.get(name)?.get(step)?.seconds ?? []);
  const peaksOf = (name: string): number =>
    Math.max(0, ...[...(figures.get(name)?.values() ?? [])].map(({ peakBytes }) => peakBytes)) / MiB;
  const others = OTHERS.map(({ name }) => name);
  const names = [...others, OURS];
  const rows = STEPS.map((step) => {
    // What is tracked is the others' second backup, too.
    const theirs = others.map((name) => secondsOf(name, step === "tracked" ? "second" : step));
    const own = secondsOf(OURS, step);
    return [`${step}, s`, ...[...theirs, own].map(formatFigure), formatFigure(Math.min(...theirs) / own)];
  });
  const memory = names.map((name) => formatFigure(peaksOf(name)));
  return markdownTable(
    [content, ...names, "× as fast as the faster"],
    [...rows, ["peak, MiB", ...memory, ""]],
  );
}

function toJson({ content, figures }: Cell): object {
  const entries = [...figures].map(([name, steps]) => [name, Object.fromEntries(steps)] as const);
  return { content, figures: Object.fromEntries(entries) };
}

await runMain("bench:repo", bench);
