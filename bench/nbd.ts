// npm run bench:nbd: the throughput of cowcatcher's NBD server and client over a Unix socket, beside qemu-nbd and
// nbdcopy in the same run. Needs qemu-utils, nbdcopy and fio.
//
//   server   the same client (nbdcopy, qemu-img, fio) reads and writes the same raw image through our `serve` and qemu-nbd
//   client   our `backup` and nbdcopy read from, and write to, the same qemu-nbd
//
// Everything is in the page cache, and nothing is synced: what is measured is the protocol's way through two processes.
// A program's start counts (Node's is 0.3 s): the image must be large enough for it not to matter.

import { tmpdir } from "node:os";
import { join } from "node:path";
import { statSync, truncateSync } from "node:fs";
import { parseArgs } from "node:util";
import { CowcatcherError } from "../src/errors.js";
import { MiB, parseSize } from "../src/units.js";
import { Child, childError, runMain, runProgram, say, scratchFolder, waitForChild } from "./lib/children.js";
import { startCowcatcher, startServe } from "./lib/cowcatcher.js";
import { makeRawDisk } from "./lib/disks.js";
import { describeMachine, machineLine, ResultFolder } from "./lib/results.js";
import { formatFigure, markdownTable, median } from "./lib/statistics.js";

const HELP = `npm run bench:nbd -- [options]
  --rounds N             interleaved rounds (5)
  --size SIZE            of the image (4G)
  --dir DIR              where the images stand (the temporary folder)
  --cell "WORD WORD"     only cells whose name holds these words; may be repeated
  --out DIR              results: nbd.md, nbd.json (bench/results)`;

interface Files {
  /** What is served. */
  disk: string;
  /** What is written to a server: other content of the same size. */
  copy: string;
  folder: string;
  sizeBytes: number;
}

/** A server that is running. */
interface Served {
  uri: string;
  stop(): Promise<void>;
}

interface Contestant {
  name: string;
  serve(files: Files): Promise<Served>;
  transfer(uri: string, files: Files): Promise<void>;
}

interface Cell {
  name: string;
  /** The first is what the ratios refer to. */
  contestants: readonly Contestant[];
}

interface CellResult {
  name: string;
  contestants: { name: string; megabytesPerSecond: number[] }[];
}

const { values } = parseArgs({
  options: {
    rounds: { type: "string", default: "5" },
    size: { type: "string", default: "4G" },
    dir: { type: "string", default: tmpdir() },
    cell: { type: "string", multiple: true, default: [] },
    out: { type: "string", default: "bench/results" },
    help: { type: "boolean", default: false },
  },
});

type Transfer = Contestant["transfer"];

const nbdcopyRead: Transfer = (uri) => run("nbdcopy", ["--", uri, "null:"]);
const nbdcopyWrite: Transfer = (uri, { copy }) => run("nbdcopy", ["--", copy, uri]);
/** Without -W and with few coroutines it would wait for each request. */
const QEMU_IMG_CONVERT = ["convert", "-n", "-m", "16", "-W"];
const qemuImgRead: Transfer = (uri, { sizeBytes }) => {
  const target = `driver=null-co,size=${sizeBytes}`;
  return run("qemu-img", [...QEMU_IMG_CONVERT, "-f", "raw", "--target-image-opts", uri, target]);
};
const qemuImgWrite: Transfer = (uri, { copy }) =>
  run("qemu-img", [...QEMU_IMG_CONVERT, "-f", "raw", "-O", "raw", copy, uri]);
/** Waits for each answer, as a program in a guest that reads a file does. */
const depthOneRead: Transfer = (uri, { folder }) => {
  const args = ["--name=reader", "--ioengine=nbd", `--uri=${uri}`, "--rw=read", "--bs=256k", "--iodepth=1"];
  return run("fio", [...args, "--output", join(folder, "fio.log")]);
};
const ourRead: Transfer = (uri) => backup([uri, "null:"]);
const ourWrite: Transfer = (uri, { copy }) => backup(["--force", "-f", "raw", "-O", "raw", copy, uri]);

const CELLS: readonly Cell[] = [
  serverCell("server, nbdcopy reads", nbdcopyRead),
  serverCell("server, depth-1 reads", depthOneRead),
  serverCell("server, nbdcopy writes", nbdcopyWrite),
  serverCell("server, qemu-img reads", qemuImgRead),
  serverCell("server, qemu-img writes", qemuImgWrite),
  clientCell("client, reads from qemu-nbd", nbdcopyRead, ourRead),
  clientCell("client, writes to qemu-nbd", nbdcopyWrite, ourWrite),
];

function serverCell(name: string, transfer: Transfer): Cell {
  return {
    name,
    contestants: [
      { name: "qemu-nbd", serve: serveQemu, transfer },
      { name: "cowcatcher serve", serve: serveOurs, transfer },
    ],
  };
}

function clientCell(name: string, theirs: Transfer, ours: Transfer): Cell {
  return {
    name,
    contestants: [
      { name: "nbdcopy", serve: serveQemu, transfer: theirs },
      { name: "cowcatcher backup", serve: serveQemu, transfer: ours },
    ],
  };
}

async function run(program: string, args: readonly string[]): Promise<void> {
  await runProgram(program, args);
}

async function backup(args: readonly string[]): Promise<void> {
  const child = startCowcatcher(["backup", "-q", ...args]);
  const { code } = await child.ended;
  if (code !== 0) throw childError(child, `exit code ${code}`);
}

async function serveQemu({ disk, folder }: Files): Promise<Served> {
  const socket = join(folder, "qemu.sock");
  const args = [
    "-f",
    "raw",
    "-x",
    "disk",
    "-k",
    socket,
    "--shared=16",
    "--persistent",
    "--cache=writeback",
    disk,
  ];
  const child = new Child("qemu-nbd", "qemu-nbd", args);
  await waitForChild(child, "socket", () => statSync(socket, { throwIfNoEntry: false }));
  return served(child, socket);
}

async function serveOurs({ disk, folder }: Files): Promise<Served> {
  const socket = join(folder, "ours.sock");
  const control = join(folder, "control.sock");
  return served(await startServe({ image: disk, format: "raw", socket, control }), socket);
}

function served(child: Child, socket: string): Served {
  return {
    uri: `nbd+unix:///disk?socket=${socket}`,
    stop: async () => {
      await child.stop();
    },
  };
}

async function bench(): Promise<number> {
  if (values.help) {
    say(HELP);
    return 0;
  }
  const filters = values.cell.map((filter) => filter.toLowerCase().split(/\s+/));
  let cells = CELLS.filter(
    ({ name }) => filters.length === 0 || filters.some((words) => words.every((word) => name.includes(word))),
  );
  const results = new ResultFolder(values.out);
  const folder = scratchFolder(values.dir);
  const sizeBytes = parseSize(values.size, "--size");
  const files = { folder, sizeBytes, disk: join(folder, "disk.raw"), copy: join(folder, "copy.raw") };
  makeRawDisk(files.disk, sizeBytes);
  makeRawDisk(files.copy, sizeBytes);
  cells = await supportedCells(cells, files);
  for (const cell of cells) if (cell.name.includes("writes")) await proveWrites(cell, files);
  const machine = await describeMachine();
  const rounds = Number(values.rounds);
  say(`${machineLine(machine)}\n${cells.length} cells`);
  const cellResults: CellResult[] = cells.map(({ name, contestants }) => ({
    name,
    contestants: contestants.map((contestant) => ({ name: contestant.name, megabytesPerSecond: [] })),
  }));
  for (let round = 0; round < rounds; round++) {
    say(`round ${round + 1} of ${rounds}`);
    for (const [index, cell] of cells.entries()) {
      const result = cellResults[index];
      if (result !== undefined) await measureCell(cell, result, round, files);
    }
    results.write("nbd.json", { machine, options: values, cells: cellResults });
  }
  const header = `${machineLine(machine)}. ${rounds} interleaved rounds, image ${values.size} in the page cache, Unix socket, medians.`;
  const table = throughputTable(cellResults);
  say(`\n${table}\n\n${results.write("nbd.md", `${header}\n\n${table}\n`)}`);
  return 0;
}

/** A version without NBD URIs refuses them at once; its client is left out then. */
async function supportedCells(cells: readonly Cell[], files: Files): Promise<Cell[]> {
  if (!cells.some(({ name }) => name.startsWith("client"))) return [...cells];
  const server = await serveQemu(files);
  try {
    await ourRead(server.uri, files);
    return [...cells];
  } catch (error) {
    if (!(error instanceof CowcatcherError) || !/not supported in this version/.test(error.problem))
      throw error;
    say(`cells of the client are left out: ${error.problem}`);
    return cells.filter(({ name }) => !name.startsWith("client"));
  } finally {
    await server.stop();
  }
}

async function measureCell(cell: Cell, result: CellResult, round: number, files: Files): Promise<void> {
  const count = cell.contestants.length;
  for (let turn = 0; turn < count; turn++) {
    const at = (turn + round) % count;
    const contestant = cell.contestants[at];
    if (contestant === undefined) continue;
    const server = await contestant.serve(files);
    try {
      const startMs = performance.now();
      await contestant.transfer(server.uri, files);
      const seconds = (performance.now() - startMs) / 1000;
      const rate = files.sizeBytes / MiB / seconds;
      result.contestants[at]?.megabytesPerSecond.push(rate);
      say(`  ${cell.name}: ${contestant.name}: ${seconds.toFixed(2)} s, ${Math.round(rate)} MiB/s`);
    } finally {
      await server.stop();
    }
  }
}

/** Once before the rounds, on a disk that holds nothing of it: what is measured must also be right. */
async function proveWrites({ contestants }: Cell, files: Files): Promise<void> {
  for (const contestant of contestants) {
    truncateSync(files.disk, 0);
    truncateSync(files.disk, files.sizeBytes);
    const server = await contestant.serve(files);
    try {
      await contestant.transfer(server.uri, files);
    } finally {
      await server.stop();
    }
    await runProgram("qemu-img", ["compare", "-f", "raw", "-F", "raw", files.disk, files.copy]);
  }
}

function throughputTable(cells: readonly CellResult[]): string {
  const rows = cells.flatMap(({ name, contestants }) => {
    const base = median(contestants[0]?.megabytesPerSecond ?? []);
    return contestants.map((contestant, index) => {
      const rate = median(contestant.megabytesPerSecond);
      return [
        `${name}: ${contestant.name}`,
        formatFigure(rate),
        index === 0 ? "1" : formatFigure(rate / base),
      ];
    });
  });
  return markdownTable(["cell", "MiB/s", "ratio"], rows);
}

await runMain("bench:nbd", bench);
