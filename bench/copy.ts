// npm run bench:copy: an offline backup beside qemu-img convert, nbdcopy and cp. Needs qemu-utils and nbdcopy.
//
// What counts is a copy that is on stable storage. cowcatcher syncs at its end; after qemu-img (whose default for a
// target, cache mode unsafe, is its fastest) and cp the target is synced with `sync -d`, within the time; nbdcopy
// gets --flush. Sources are in the page cache. Each target of the first round is compared with its source.
//
// The compressed cells copy what can be compressed, at the levels that qemu-img has (zlib 6, zstd 3), and compare the
// targets' sizes too. Their source is the Node executable over and over: machine code, tables and text in the shares
// that a system disk might have, and there wherever this runs. Clusters are compressed one by one, so that it
// repeats helps nobody.

import { closeSync, openSync, readFileSync, rmSync, statSync, writeSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { MiB, TiB, parseSize } from "../src/units.js";
import { runMain, runProgram, say, scratchFolder } from "./lib/children.js";
import type { DiskFormat } from "./lib/contestant.js";
import { COWCATCHER_BIN } from "./lib/cowcatcher.js";
import { convertDisk, makeRawDisk } from "./lib/disks.js";
import { describeMachine, machineLine, ResultFolder } from "./lib/results.js";
import { formatFigure, markdownTable, median } from "./lib/statistics.js";

const HELP = `npm run bench:copy -- [options]
  --rounds N             interleaved rounds (5)
  --size SIZE            of the dense and half sparse disks (1G)
  --hole-size SIZE       of the disk that is all hole (1T)
  --dir DIR              where source and target stand (the temporary folder)
  --cell "WORD WORD"     only cells whose name holds these words; may be repeated
  --quick                one round, dense, raw to raw and qcow2 to qcow2
  --out DIR              results: copy.md, copy.json (bench/results)`;

const FORMATS: readonly DiskFormat[] = ["raw", "qcow2"];

interface Content {
  name: string;
  dataShare: 0 | 0.5 | 1;
}

const CONTENTS: readonly Content[] = [
  { name: "dense", dataShare: 1 },
  { name: "half sparse", dataShare: 0.5 },
  { name: "all hole", dataShare: 0 },
];
const COMPRESSIBLE: Content = { name: "compressible", dataShare: 1 };

type Compression = "zlib" | "zstd";
const COMPRESSIONS: readonly Compression[] = ["zlib", "zstd"];

interface Copy {
  content: Content;
  from: DiskFormat;
  to: DiskFormat;
  source: string;
  target: string;
  compression: Compression | undefined;
}

interface Contestant {
  name: string;
  canDo(copy: Copy): boolean;
  run(copy: Copy): Promise<void>;
}

interface CopyCell {
  name: string;
  copy: Copy;
  seconds: Map<string, number[]>;
  /** Bytes that the last target takes on the disk. */
  targetBytes: Map<string, number>;
}

const CONTESTANTS: readonly Contestant[] = [
  { name: "qemu-img convert -m 16 -W", canDo: () => true, run: qemuImgConvert },
  // Between images of other formats than raw it needs qemu-nbd on both sides.
  { name: "nbdcopy --flush", canDo: ({ compression }) => !compression, run: nbdcopy },
  { name: "cp", canDo: ({ from, to, compression }) => from === to && !compression, run: cp },
  { name: "cowcatcher backup", canDo: () => true, run: cowcatcherBackup },
];
const BASE = "qemu-img convert -m 16 -W";
const OURS = "cowcatcher backup";

const { values } = parseArgs({
  options: {
    rounds: { type: "string" },
    size: { type: "string", default: "1G" },
    "hole-size": { type: "string", default: String(TiB) },
    dir: { type: "string", default: tmpdir() },
    cell: { type: "string", multiple: true, default: [] },
    quick: { type: "boolean", default: false },
    out: { type: "string", default: "bench/results" },
    help: { type: "boolean", default: false },
  },
});

async function qemuImgConvert({ from, to, source, target, compression }: Copy): Promise<void> {
  const compress = compression === undefined ? [] : ["-c", "-o", `compression_type=${compression}`];
  const args = ["convert", "-m", "16", "-W", ...compress, "-f", from, "-O", to, source, target];
  await runProgram("qemu-img", args);
  await runProgram("sync", ["-d", target]);
}

async function nbdcopy({ from, to, source, target }: Copy): Promise<void> {
  const viaServer = (format: DiskFormat, path: string): string[] =>
    format === "raw" ? [path] : ["[", "qemu-nbd", "-f", format, path, "]"];
  // A qcow2 target must be there; a raw one is made by nbdcopy, unless its source is a server.
  if (to === "qcow2") await createQcow2(source, from, target);
  await runProgram("nbdcopy", ["--flush", "--", ...viaServer(from, source), ...viaServer(to, target)]);
  if (to === "qcow2") await runProgram("sync", ["-d", target]);
}

async function createQcow2(source: string, format: DiskFormat, target: string): Promise<void> {
  const { stdout } = await runProgram("qemu-img", ["info", "--output=json", "-f", format, source]);
  const size = (JSON.parse(stdout) as { "virtual-size": number })["virtual-size"];
  await runProgram("qemu-img", ["create", "-q", "-f", "qcow2", target, String(size)]);
}

async function cp({ source, target }: Copy): Promise<void> {
  await runProgram("cp", ["--reflink=never", "--sparse=auto", source, target]);
  await runProgram("sync", ["-d", target]);
}

async function cowcatcherBackup({ from, to, source, target, compression }: Copy): Promise<void> {
  const compress = compression === undefined ? [] : ["-c", compression];
  const args = ["backup", "-q", ...compress, "-f", from, "-O", to, source, target];
  await runProgram(process.execPath, [COWCATCHER_BIN, ...args]);
}

async function bench(): Promise<number> {
  if (values.help) {
    say(HELP);
    return 0;
  }
  const results = new ResultFolder(values.out);
  const folder = scratchFolder(values.dir);
  const cells = selectCells(folder);
  if (cells.length === 0) {
    say("no cell has such a name");
    return 1;
  }
  const machine = await describeMachine();
  const rounds = Number(values.rounds ?? (values.quick ? 1 : 5));
  say(`${machineLine(machine)}\n${cells.length} cells`);
  await makeSources(cells, folder);
  for (let round = 0; round < rounds; round++) {
    say(`round ${round + 1} of ${rounds}`);
    for (const cell of cells) await measureCell(cell, round, folder);
    results.write("copy.json", { machine, options: values, cells: cells.map(toJson) });
  }
  const header = `${machineLine(machine)}. ${rounds} interleaved rounds, disk ${values.size}, median seconds, sync included.`;
  const table = [copyTable(cells), compressedTable(cells)].filter((text) => text !== "").join("\n\n");
  const path = results.write("copy.md", `${header}\n\n${table}\n`);
  say(`\n${table}\n\n${path}`);
  return 0;
}

function selectCells(folder: string): CopyCell[] {
  const plain = CONTENTS.flatMap((content) =>
    FORMATS.flatMap((from) => FORMATS.map((to) => makeCell(folder, content, from, to))),
  );
  const compressed = FORMATS.flatMap((from) =>
    COMPRESSIONS.map((compression) => makeCell(folder, COMPRESSIBLE, from, "qcow2", compression)),
  );
  const filters = values.cell.map((filter) => filter.toLowerCase().split(/\s+/));
  return [...plain, ...compressed].filter(({ name, copy }) => {
    if (values.quick && (copy.content.dataShare !== 1 || copy.from !== copy.to)) return false;
    return filters.length === 0 || filters.some((words) => words.every((word) => name.includes(word)));
  });
}

function makeCell(
  folder: string,
  content: Content,
  from: DiskFormat,
  to: DiskFormat,
  compression?: Compression,
): CopyCell {
  const source = join(folder, `${content.name.replace(" ", "-")}.${from}`);
  return {
    name: `${content.name}, ${from} to ${to}${compression === undefined ? "" : `, ${compression}`}`,
    copy: { content, from, to, source, target: join(folder, `target.${to}`), compression },
    seconds: new Map(),
    targetBytes: new Map(),
  };
}

async function makeSources(cells: readonly CopyCell[], folder: string): Promise<void> {
  const made = new Set<string>();
  for (const { content, from, source } of cells.map(({ copy }) => copy)) {
    if (made.has(source)) continue;
    made.add(source);
    const isHole = content.dataShare === 0;
    const sizeBytes = parseSize(
      isHole ? values["hole-size"] : values.size,
      isHole ? "--hole-size" : "--size",
    );
    const raw = from === "raw" ? source : `${source}.raw`;
    if (content === COMPRESSIBLE) makeCompressibleDisk(raw, sizeBytes);
    else makeRawDisk(raw, sizeBytes, content.dataShare);
    if (from === "raw") continue;
    if (isHole) await runProgram("qemu-img", ["create", "-q", "-f", from, source, String(sizeBytes)]);
    else await convertDisk(raw, source, from);
    rmSync(raw);
  }
  await runProgram("sync", ["-f", folder]);
}

function makeCompressibleDisk(path: string, sizeBytes: number): void {
  const program = readFileSync(process.execPath);
  const fd = openSync(path, "wx", 0o600);
  try {
    for (let offset = 0; offset < sizeBytes; offset += program.length) {
      writeSync(fd, program, 0, Math.min(program.length, sizeBytes - offset), offset);
    }
  } finally {
    closeSync(fd);
  }
}

async function measureCell(cell: CopyCell, round: number, folder: string): Promise<void> {
  const { name, copy, seconds, targetBytes } = cell;
  const contestants = CONTESTANTS.filter((contestant) => contestant.canDo(copy));
  for (let turn = 0; turn < contestants.length; turn++) {
    const contestant = contestants[(turn + round) % contestants.length];
    if (contestant === undefined) continue;
    const startMs = performance.now();
    await contestant.run(copy);
    const taken = (performance.now() - startMs) / 1000;
    seconds.set(contestant.name, [...(seconds.get(contestant.name) ?? []), taken]);
    const bytes = statSync(copy.target).blocks * 512;
    targetBytes.set(contestant.name, bytes);
    const targetMiB = Math.round(bytes / MiB);
    if (round === 0) await compare(copy);
    say(`  ${name}: ${contestant.name}: ${taken.toFixed(2)} s, ${targetMiB} MiB on the disk`);
    rmSync(copy.target);
    await runProgram("sync", ["-f", folder]);
  }
}

async function compare({ from, to, source, target }: Copy): Promise<void> {
  await runProgram("qemu-img", ["compare", "-f", from, "-F", to, source, target]);
}

function toJson({ name, seconds, targetBytes }: CopyCell): object {
  return { name, seconds: Object.fromEntries(seconds), targetBytes: Object.fromEntries(targetBytes) };
}

function copyTable(cells: readonly CopyCell[]): string {
  const plain = cells.filter(({ copy }) => copy.compression === undefined);
  if (plain.length === 0) return "";
  const names = CONTESTANTS.map(({ name }) => name);
  const rows = plain.map(({ name, seconds }) => {
    const medians = names.map((contestant) => median(seconds.get(contestant) ?? []));
    const base = median(seconds.get(BASE) ?? []);
    const ours = medians.at(-1) ?? NaN;
    return [name, ...medians.map(formatFigure), formatFigure(base / ours)];
  });
  return markdownTable(["cell", ...names, "× as fast as qemu-img"], rows);
}

function compressedTable(cells: readonly CopyCell[]): string {
  const compressed = cells.filter(({ copy }) => copy.compression !== undefined);
  if (compressed.length === 0) return "";
  const rows = compressed.map(({ name, seconds, targetBytes }) => {
    const secondsOf = (contestant: string): number => median(seconds.get(contestant) ?? []);
    const mebibytesOf = (contestant: string): number => (targetBytes.get(contestant) ?? NaN) / MiB;
    const figures = [
      ...[secondsOf(BASE), secondsOf(OURS), secondsOf(BASE) / secondsOf(OURS)],
      ...[mebibytesOf(BASE), mebibytesOf(OURS), mebibytesOf(OURS) / mebibytesOf(BASE)],
    ];
    return [name, ...figures.map(formatFigure)];
  });
  const convert = "qemu-img convert -c -m 16 -W";
  const header = [
    "cell",
    convert,
    `${OURS} -c`,
    "× as fast",
    `${convert}, MiB`,
    `${OURS}, MiB`,
    "× the size",
  ];
  return markdownTable(header, rows);
}

await runMain("bench:copy", bench);
