// The guest benchmark's matrix: what the guest does × the disk's format × how the target is held back × what the
// backup does. A cell holds the contestants that are compared; a cell's first one is what its ratios refer to.

import { MiB } from "../../src/units.js";
import type { Contestant, DiskFormat, RbdPlace, Throttle } from "./contestant.js";
import type { FioPattern } from "./fio.js";
import { cowcatcher, plainWrites } from "./ours.js";
import { BELOW_TARGET, MEMORY_IMAGE, ONE_WORKER, qemu, SMALL_STEPS } from "./qemu.js";
import { storage } from "./storage.js";

export interface Cell {
  /** What `--cell` filters and the tables show: pattern, format, target, scenario. */
  name: string;
  pattern: FioPattern;
  format: DiskFormat;
  throttle: Throttle;
  /** O_DIRECT on both sides, the disk not in the page cache. */
  direct: boolean;
  /** The guest is at work when the backup is asked for, so that what comes before T0, and T0 itself, count as well. */
  throughStart: boolean;
  /** QEMU's, where there is one to compare with, comes first. */
  contestants: Contestant[];
}

/** The job that this project began with (2019): its cells are measured in every scenario. */
const MAIN_PATTERN: FioPattern = { name: "randwrite 32k qd8", rw: "randwrite", blockSize: "32k", ioDepth: 8 };

const SMALL_PATTERN: FioPattern = {
  name: "randwrite 4k qd32",
  rw: "randwrite",
  blockSize: "4k",
  ioDepth: 32,
};
const FIXED_PATTERN: FioPattern = {
  name: "fixed 4000/s 32k",
  rw: "randwrite",
  blockSize: "32k",
  ioDepth: 32,
  ratePerSecond: 4000,
};

const DIRECT_PATTERNS: readonly FioPattern[] = ["4k", "32k"].flatMap((blockSize) =>
  [1, 8, 32].map((ioDepth): FioPattern => {
    const name = `randwrite ${blockSize} qd${ioDepth}`;
    return { name, rw: "randwrite", blockSize, ioDepth };
  }),
);

export const PATTERNS: readonly FioPattern[] = [
  MAIN_PATTERN,
  SMALL_PATTERN,
  { name: "seqwrite 1M qd4", rw: "write", blockSize: "1M", ioDepth: 4 },
  { name: "randrw 70/30 16k qd8", rw: "randrw", blockSize: "16k", ioDepth: 8, readShare: 70 },
  FIXED_PATTERN,
];

const NO_TARGET: Throttle = { name: "no backup" };
/** Both sides get the same number of bytes a second. */
export const SLOW_TARGET: Throttle = { name: "50 MB/s", bytesPerSecond: 50 * MiB };
const FASTER: Throttle = { name: "200 MB/s", bytesPerSecond: 200 * MiB };
const DELAYED: Throttle = { name: "20 ms a write", writeDelayMs: 20 };

interface Scenario {
  name: string;
  contestants: Contestant[];
}

const NO_BACKUP: Scenario = {
  name: "no backup",
  contestants: [qemu("none"), cowcatcher("no backup", undefined)],
};
const UNBUFFERED: Scenario = {
  name: "unbuffered",
  contestants: [
    qemu("plain"),
    qemu("plain", ONE_WORKER),
    qemu("plain", BELOW_TARGET),
    cowcatcher("unbuffered", ["--cow-buffer-size", "0"]),
  ],
};
const BUFFERED: Scenario = {
  name: "buffered 1 GiB",
  contestants: [
    qemu("fleecing"),
    qemu("fleecing", MEMORY_IMAGE),
    cowcatcher("buffered", ["--cow-buffer-size", "1G"]),
  ],
};
const SMALL_BUFFER: Scenario = {
  name: "buffered 64 MiB",
  contestants: [
    qemu("fleecing"),
    ...["spill", "wait", "cancel"].map((policy) =>
      cowcatcher(`64 MiB, ${policy}`, ["--cow-buffer-size", "64M", "--on-buffer-full", policy]),
    ),
  ],
};
const BACKUPS = [UNBUFFERED, BUFFERED, SMALL_BUFFER];

export const THREADS = "no backup, without io_uring";
const DIRECT_NO_BACKUP: Contestant[] = [
  ...NO_BACKUP.contestants,
  cowcatcher(THREADS, undefined, [], { COWCATCHER_NO_IO_URING: "1" }),
];

/** Every combination. */
export function allCells(): Cell[] {
  return PATTERNS.flatMap((pattern) =>
    (["raw", "qcow2"] as const).flatMap((format) => [
      makeCell(pattern, format, NO_TARGET, NO_BACKUP),
      ...[SLOW_TARGET, FASTER, DELAYED].flatMap((throttle) =>
        BACKUPS.map((scenario) => makeCell(pattern, format, throttle, scenario)),
      ),
      ...directCells(pattern, format),
    ]),
  );
}

function directCells(pattern: FioPattern, format: DiskFormat): Cell[] {
  const of = (throttle: Throttle, scenario: Scenario): Cell =>
    makeCell(pattern, format, throttle, scenario, { direct: true });
  return [of(NO_TARGET, NO_BACKUP), of(SLOW_TARGET, UNBUFFERED), of(SLOW_TARGET, BUFFERED)];
}

/** What `--direct` measures: a guest with few, some and many requests at a time, small and large. */
export function directMatrix(): Cell[] {
  return DIRECT_PATTERNS.flatMap((pattern) =>
    (["raw", "qcow2"] as const).flatMap((format) => {
      const contestants = [...DIRECT_NO_BACKUP, ...(format === "raw" ? [storage()] : [])];
      return [
        makeCell(pattern, format, NO_TARGET, { ...NO_BACKUP, contestants }, { direct: true }),
        makeCell(pattern, format, SLOW_TARGET, BUFFERED, { direct: true }),
      ];
    }),
  );
}

/** Those on which the project's aims are (guest-aims.ts). */
export function aimCells(): Cell[] {
  const cell = (pattern: FioPattern, format: DiskFormat, scenario: Scenario, direct = false): Cell =>
    makeCell(pattern, format, scenario === NO_BACKUP ? NO_TARGET : SLOW_TARGET, scenario, { direct });
  return [
    ...[MAIN_PATTERN, SMALL_PATTERN].flatMap((pattern) =>
      (["raw", "qcow2"] as const).map((format) => cell(pattern, format, NO_BACKUP)),
    ),
    cell(MAIN_PATTERN, "raw", BUFFERED),
    cell(MAIN_PATTERN, "qcow2", BUFFERED),
    cell(SMALL_PATTERN, "raw", BUFFERED),
    cell(FIXED_PATTERN, "raw", NO_BACKUP),
    cell(FIXED_PATTERN, "raw", BUFFERED),
    makeCell(FIXED_PATTERN, "raw", SLOW_TARGET, BUFFERED, { throughStart: true }),
    cell(MAIN_PATTERN, "raw", UNBUFFERED),
    cell(MAIN_PATTERN, "raw", SMALL_BUFFER),
    cell(MAIN_PATTERN, "raw", NO_BACKUP, true),
    cell(MAIN_PATTERN, "raw", BUFFERED, true),
  ];
}

/** Those of which `--whole` measures the backup from T0 to its end. */
export function wholeBackupCells(): Cell[] {
  return [
    makeCell(MAIN_PATTERN, "raw", SLOW_TARGET, BUFFERED),
    makeCell(MAIN_PATTERN, "qcow2", SLOW_TARGET, BUFFERED),
    makeCell(SMALL_PATTERN, "raw", SLOW_TARGET, BUFFERED),
  ];
}

/** What a run without options measures: every pattern on the slow target, and the main one on the others too. */
export function usualCells(): Cell[] {
  return allCells().filter(({ name, pattern, format, throttle, direct }) => {
    if (pattern === MAIN_PATTERN && format === "raw") return true;
    if (direct) return false;
    const isPlain = throttle === NO_TARGET || throttle === SLOW_TARGET;
    return isPlain && !name.endsWith(SMALL_BUFFER.name);
  });
}

export function quickCells(): Cell[] {
  return [NO_BACKUP, UNBUFFERED, BUFFERED].map((scenario) =>
    makeCell(MAIN_PATTERN, "raw", scenario === NO_BACKUP ? NO_TARGET : SLOW_TARGET, scenario),
  );
}

/** Cells whose name holds every word of one of the filters; all of them without filters. */
export function filterCells<T extends { name: string }>(
  cells: readonly T[],
  filters: readonly string[],
): T[] {
  const wanted = filters.map((filter) => filter.toLowerCase().split(/\s+/));
  if (wanted.length === 0) return [...cells];
  return cells.filter(({ name }) => {
    const text = name.toLowerCase();
    return wanted.some((words) => words.every((word) => text.includes(word)));
  });
}

/** The picture's contestants, on the slow target. */
export function timelineCell(): Cell {
  const contestants = [...BUFFERED.contestants, ...UNBUFFERED.contestants].filter(
    ({ name }) => !name.includes("tuned"),
  );
  return { ...makeCell(MAIN_PATTERN, "raw", SLOW_TARGET, BUFFERED), contestants };
}

/** The table that the project began with, on a real image: no backup, an unbuffered one, a buffered one. */
export function rbdCells(rbd: RbdPlace): Cell[] {
  const throttle: Throttle = { name: "Ceph RBD", rbd };
  return [
    makeCell(MAIN_PATTERN, "raw", NO_TARGET, NO_BACKUP),
    makeCell(MAIN_PATTERN, "raw", throttle, {
      ...UNBUFFERED,
      contestants: [
        qemu("plain"),
        qemu("plain", SMALL_STEPS),
        ...UNBUFFERED.contestants.filter(({ name }) => !name.startsWith("QEMU")),
      ],
    }),
    makeCell(MAIN_PATTERN, "raw", throttle, BUFFERED),
    // At full speed the guest that writes more leaves the OSD less; here both are served the same.
    makeCell(FIXED_PATTERN, "raw", NO_TARGET, NO_BACKUP),
    makeCell(FIXED_PATTERN, "raw", throttle, BUFFERED),
  ];
}

function makeCell(
  pattern: FioPattern,
  format: DiskFormat,
  throttle: Throttle,
  scenario: Scenario,
  { direct = false, throughStart = false } = {},
): Cell {
  const place = throttle === NO_TARGET ? "" : `${throttle.name}, `;
  const access = direct ? "direct, " : "";
  const when = throughStart ? ", from before its start" : "";
  const name = `${pattern.name}, ${format}, ${access}${place}${scenario.name}${when}`;
  // A steady guest's latencies are as much the machine's as the server's.
  const showsNoise = pattern.ratePerSecond !== undefined && !direct && !throughStart;
  const contestants = [...scenario.contestants, ...(showsNoise ? [plainWrites()] : [])];
  return { name, pattern, format, throttle, direct, throughStart, contestants };
}
