// npm run bench:rbd: the story of this project, with a real Ceph. A guest on a fast local disk, its backup on an RBD image:
// no backup, an unbuffered one, a buffered one, beside QEMU's own ways in the same run; and copies of a whole disk to and from
// an image, beside qemu-img convert. Needs fio, qemu-utils, qemu-block-extra, ceph-mon, ceph-osd, ceph-common.
//
// The cluster is one OSD on this machine's disk. It stands for other machines, whose processors no guest shares: so its
// daemons have what guest, server and QEMU leave of this one's (nice 19), whoever is measured. What that says of a Ceph of
// many machines is the order of things, not the figures.

import { rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { MiB, parseSize } from "../src/units.js";
import { createRbdImage, rbdAddress, removeRbdImage, startCeph } from "./lib/ceph.js";
import { runMain, runProgram, say, scratchFolder } from "./lib/children.js";
import { startCowcatcher } from "./lib/cowcatcher.js";
import type { RbdPlace } from "./lib/contestant.js";
import { makeRawDisk } from "./lib/disks.js";
import { filterCells, rbdCells } from "./lib/guest-cells.js";
import { type CellResult, guestTable } from "./lib/guest-report.js";
import { measure } from "./lib/measure-guest.js";
import { describeMachine, machineLine, ResultFolder } from "./lib/results.js";
import { formatFigure, markdownTable, medianOf } from "./lib/statistics.js";

const HELP = `npm run bench:rbd -- [options]
  --rounds N             interleaved rounds (3)
  --seconds N            of the guest in each measurement (8)
  --size SIZE            of the disk (1G)
  --dir DIR              where the cluster stands, and the copies' disk (the temporary folder)
  --guest-dir DIR        where the guest's disk stands (DIR); in memory it is the fast local disk of the story
  --cell "WORD WORD"     only cells whose name holds these words; may be repeated
  --no-guest             copies only
  --no-copy              guest only
  --out DIR              results: rbd.md, rbd.json (bench/results)`;

/** A cluster that is filled slows down; images are removed after each measurement. */
const STORE_BYTES = 8 * 1024 * MiB;
const CEPH_NICENESS = 19;
const BACKUP_TIMEOUT_SECONDS = 300;

const { values } = parseArgs({
  options: {
    rounds: { type: "string", default: "3" },
    seconds: { type: "string", default: "8" },
    size: { type: "string", default: "1G" },
    dir: { type: "string", default: tmpdir() },
    "guest-dir": { type: "string" },
    cell: { type: "string", multiple: true, default: [] },
    "no-guest": { type: "boolean", default: false },
    "no-copy": { type: "boolean", default: false },
    out: { type: "string", default: "bench/results" },
    help: { type: "boolean", default: false },
  },
});

interface Copy {
  name: string;
  run: () => Promise<void>;
  seconds: number[];
}

async function bench(): Promise<number> {
  if (values.help) {
    say(HELP);
    return 0;
  }
  const results = new ResultFolder(values.out);
  const folder = scratchFolder(values.dir);
  const machine = await describeMachine();
  say(machineLine(machine));
  const disk = join(folder, "disk.raw");
  makeRawDisk(disk, parseSize(values.size, "--size"));
  await runProgram("sync", ["-f", folder]);
  const ceph = await startCeph(join(folder, "ceph"), {
    storeBytes: STORE_BYTES,
    isFilled: true,
    niceness: CEPH_NICENESS,
  });
  try {
    const place: RbdPlace = { conf: ceph.conf, pool: "rbd", image: "target" };
    const cells = values["no-guest"] ? [] : await measureGuest(disk, place);
    const copies = values["no-copy"] ? [] : await measureCopies(disk, folder, place);
    results.write("rbd.json", { machine, options: values, cells, copies });
    const header = `${machineLine(machine)}. Ceph: one OSD (BlueStore on a file) on the same machine, at nice 19.${values["guest-dir"] === undefined ? "" : ` The guest's disk: ${values["guest-dir"]}.`} Disk ${values.size} of random data; ${values.rounds} interleaved rounds, the guest for ${values.seconds} s from T0 on; medians.`;
    const parts = [
      ...(cells.length > 0 ? [guestTable(cells)] : []),
      ...(copies.length > 0 ? [copyTable(copies)] : []),
    ];
    say(`\n${parts.join("\n\n")}\n\n${results.write("rbd.md", [header, ...parts].join("\n\n"))}`);
    return 0;
  } finally {
    await ceph.stop();
  }
}

async function measureGuest(copyDisk: string, place: RbdPlace): Promise<CellResult[]> {
  const folder = scratchFolder(values["guest-dir"] ?? values.dir);
  const disk = values["guest-dir"] === undefined ? copyDisk : join(folder, "disk.raw");
  if (disk !== copyDisk) await runProgram("cp", [copyDisk, disk]);
  const cells = filterCells(rbdCells(place), values.cell);
  const found: CellResult[] = cells.map(({ name, contestants }) => ({
    name,
    contestants: contestants.map((contestant) => ({ name: contestant.name, measurements: [] })),
  }));
  const options = {
    disk,
    folder,
    guestSeconds: Number(values.seconds),
    backupTimeoutSeconds: BACKUP_TIMEOUT_SECONDS,
  };
  for (let round = 0; round < Number(values.rounds); round++) {
    for (const [index, cell] of cells.entries()) {
      const count = cell.contestants.length;
      for (let turn = 0; turn < count; turn++) {
        const at = (turn + round) % count;
        const contestant = cell.contestants[at];
        if (contestant === undefined) continue;
        const measurement = await measure(cell, contestant, options);
        found[index]?.contestants[at]?.measurements.push(measurement);
        const backup =
          measurement.backupSeconds === undefined ? "" : `, backup ${measurement.backupSeconds.toFixed(1)} s`;
        say(`  ${cell.name}: ${contestant.name}: ${Math.round(measurement.iops)} IOPS${backup}`);
      }
    }
  }
  return found;
}

/** All end with the data on the OSD: a new image is written, and a file that is synced. */
async function measureCopies(disk: string, folder: string, place: RbdPlace): Promise<Copy[]> {
  const sizeBytes = parseSize(values.size, "--size");
  const address = rbdAddress(place);
  const source: RbdPlace = { ...place, image: "source" };
  const out = join(folder, "out.raw");
  const convert = (...args: string[]): Promise<unknown> =>
    runProgram("qemu-img", ["convert", "-f", "raw", "-O", "raw", "-m", "16", "-W", ...args]);
  const ours = async (...args: string[]): Promise<void> => {
    const { code, stderr } = await startCowcatcher(args).ended;
    if (code !== 0) throw new Error(stderr);
  };
  const copies: Copy[] = [
    {
      name: "to RBD: qemu-img convert -m 16 -W",
      seconds: [],
      run: async () => {
        await createRbdImage(place, sizeBytes);
        await convert("-n", disk, address);
      },
    },
    { name: "to RBD: cowcatcher backup", seconds: [], run: () => ours("backup", "-q", disk, address) },
    {
      name: "from RBD: qemu-img convert -m 16 -W",
      seconds: [],
      run: async () => {
        await convert(rbdAddress(source), out);
        await runProgram("sync", ["-d", out]);
      },
    },
    {
      name: "from RBD: cowcatcher restore",
      seconds: [],
      run: () => ours("restore", "-q", rbdAddress(source), out),
    },
  ];
  await ours("backup", "-q", disk, rbdAddress(source));
  for (let round = 0; round < Number(values.rounds); round++) {
    for (let turn = 0; turn < copies.length; turn++) {
      const copy = copies[(turn + 2 * round) % copies.length];
      if (copy === undefined) continue;
      const startMs = performance.now();
      await copy.run();
      copy.seconds.push((performance.now() - startMs) / 1000);
      say(`  ${copy.name}: ${copy.seconds.at(-1)?.toFixed(1)} s`);
      await removeRbdImage(place);
      rmSync(out, { force: true });
    }
  }
  await removeRbdImage(source);
  return copies;
}

function copyTable(copies: readonly Copy[]): string {
  const sizeMiB = parseSize(values.size, "--size") / MiB;
  const rows = copies.map(({ name, seconds }) => {
    const median = medianOf(seconds, (each) => each);
    return [name, formatFigure(median), formatFigure(sizeMiB / median)];
  });
  return markdownTable(["copy of the whole disk", "s", "MiB/s"], rows);
}

await runMain("bench:rbd", bench);
