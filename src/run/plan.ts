// What a job's next backup is: full or incremental, what it builds on, and the arguments of `backup` that make it.
//
// An incremental file needs three things: somebody who keeps track of the disk (a server at `control`, by checkpoints; the
// QEMU at `qmp` or of `libvirt`, by bitmaps that are found by the backup's file), a qcow2 target, and a last backup
// whose chain is whole and of
// which the other side still knows what has changed since, the same for all disks of the job. What is missing makes it a full
// one under `level: auto`, with the reason said; under `incremental` it is an error. A chain whose first backup is older than
// `full-every` is ended: a server's checkpoints are deleted afterwards (aftermath.ts), a bitmap goes with the new chain's start.
import { basename, dirname } from "node:path";
import { CowcatcherError } from "../errors.js";
import { chainOf, type KnownBackup, readHistory } from "./history.js";
import { isOfQemu, type Job } from "./job.js";
import { dateWord, fillPattern } from "./pattern.js";

export interface PlannedDisk {
  /** As `--disk` has it; undefined: the only one there is. */
  name: string | undefined;
  /** For file names and manifests. */
  label: string;
  /** Address of what is read. */
  source: string;
  /** Path, address, or REPO::GROUP. */
  target: string;
  /** All earlier backups of it, the oldest first; of files alone. */
  history: readonly KnownBackup[];
  parent: KnownBackup | undefined;
}

export interface Plan {
  /** Decided by `backup` itself where it goes into a repository. */
  level: "full" | "incremental" | "by-repository";
  reason: string;
  disks: readonly PlannedDisk[];
  /** The name under which the server remembers this backup's T0. */
  checkpoint: string | undefined;
  /** Somebody keeps track of what changes from this backup's T0 on. */
  isRemembered: boolean;
  /** One for all disks, whose T0 is one then; of images that nobody writes, into files, one for each. */
  commands: readonly PlannedCommand[];
}

export interface PlannedCommand {
  /** Arguments of `backup`. */
  args: readonly string[];
  disks: readonly PlannedDisk[];
}

/** What is known not to work. */
export interface PlanLimits {
  /** A full one, and why. */
  fullBecause?: string | undefined;
  /** Nobody can remember this backup's T0. */
  noMemory?: boolean | undefined;
}

/** What the only disk of a guest is called where nobody named it. */
const ONLY_DISK = "disk";
const KEEPS_BASE = "--bitmap-keeps-base";
const REASON_INCREMENTAL = "the last backup is there, and what has changed since is known";
/** The deepest chain that is built on: each read of the last backup looks through all of it. */
const MAX_CHAIN = 100;

/**
 * @param names of the disks, in order, where the job has them from its server
 * @throws CowcatcherError NO_BASIS for `level: incremental` without what it needs; IO.
 */
export async function planBackup(
  job: Job,
  names: readonly string[] | undefined,
  start: Date,
  limits: PlanLimits = {},
): Promise<Plan> {
  const disks: PlannedDisk[] = [];
  for (const disk of bareDisks(job, names, start)) {
    const isFile = job.target.kind === "pattern" && job.target.pattern.isFile;
    const history = isFile ? await readHistory(dirname(disk.target), job.name, disk.label) : [];
    disks.push({ ...disk, history });
  }
  return planWith(job, disks, start, limits);
}

/** Folders of the files that the job is to make. */
export function targetFolders(job: Job, names: readonly string[] | undefined, start: Date): string[] {
  if (job.target.kind !== "pattern" || !job.target.pattern.isFile) return [];
  return [...new Set(bareDisks(job, names, start).map(({ target }) => dirname(target)))];
}

/** The plan of a job that has made no backup yet; of disks that only the server knows one stands for all. */
export function planFirst(job: Job): Plan {
  const start = new Date();
  return planWith(job, bareDisks(job, undefined, start), start, {
    fullBecause: "there is no earlier backup",
  });
}

function planWith(
  job: Job,
  disks: readonly PlannedDisk[],
  start: Date,
  { fullBecause, noMemory = false }: PlanLimits,
): Plan {
  const { target } = job;
  if (target.kind === "repository") {
    const level = fullBecause === undefined ? job.level : "full";
    const args = ["--repo", target.repository, "--group", job.group, "--level", level, ...job.keyArguments];
    return {
      level: "by-repository",
      reason: "",
      disks,
      checkpoint: undefined,
      isRemembered: false,
      commands: [{ args: [...args, ...job.options, ...sourceArguments(job, disks)], disks }],
    };
  }
  const { pattern } = target;
  refuseSameTarget(disks);
  const canBeIncremental = job.source.kind !== "images" && pattern.isFile && isQcow2(job, pattern.text);
  const basis = canBeIncremental
    ? basisOf(job, disks, start, fullBecause)
    : { why: fullBecause ?? "it is the only kind for this source and target" };
  if ("why" in basis && job.level === "incremental" && fullBecause === undefined)
    throw noBasis(job, basis.why);
  const isIncremental = "parents" in basis;
  const planned = disks.map((disk, index) => ({
    ...disk,
    parent: isIncremental ? basis.parents[index] : undefined,
  }));
  const isRemembered = canBeIncremental && job.level !== "full" && !noMemory;
  const hasBitmaps = isOfQemu(job.source);
  const checkpoint = isRemembered && !hasBitmaps ? checkpointName(job.name, dateWord(start)) : undefined;
  return {
    level: isIncremental ? "incremental" : "full",
    reason: isIncremental ? REASON_INCREMENTAL : basis.why,
    disks: planned,
    checkpoint,
    isRemembered,
    commands: commandsFor(job, planned, [
      ...(checkpoint === undefined ? [] : ["--checkpoint", checkpoint]),
      ...(isRemembered && hasBitmaps ? ["--bitmap", "auto"] : []),
      ...(isRemembered && hasBitmaps && !isIncremental ? replacedArguments(disks) : []),
      ...(isIncremental ? incrementalArguments(basis) : verifyArguments(job)),
      // It is looked at afterwards, and where it is bad the next one builds on the same base.
      ...(isRemembered && hasBitmaps && isIncremental && job.verify !== undefined ? [KEEPS_BASE] : []),
      ...job.options,
    ]),
  };
}

function commandsFor(job: Job, disks: readonly PlannedDisk[], args: readonly string[]): PlannedCommand[] {
  if (job.source.kind === "images") {
    return disks.map((disk) => ({ args: [...args, disk.source, disk.target], disks: [disk] }));
  }
  return [{ args: [...args, ...sourceArguments(job, disks), ...disks.map(({ target }) => target)], disks }];
}

/** Without their history. */
function bareDisks(job: Job, names: readonly string[] | undefined, start: Date): PlannedDisk[] {
  const { source, target } = job;
  const bare =
    source.kind === "images"
      ? source.disks.map(({ name, image }) => ({ name, label: name, source: image }))
      : (source.disks ?? names ?? [undefined]).map((name) => ({
          name,
          label: name ?? ONLY_DISK,
          source: source.kind === "libvirt" ? source.domain : source.socket,
        }));
  const date = dateWord(start);
  return bare.map((disk) => ({
    ...disk,
    target:
      target.kind === "repository"
        ? `${target.repository}::${job.group}`
        : fillPattern(target.pattern, { group: job.group, disk: disk.label, date }),
    history: [],
    parent: undefined,
  }));
}

function sourceArguments({ source }: Job, disks: readonly PlannedDisk[]): string[] {
  const named = disks.flatMap(({ name }) => (name === undefined ? [] : ["--disk", name]));
  if (source.kind === "images") return [...named, ...disks.map(({ source: image }) => image)];
  return [...ownerArguments(source), ...named];
}

/** Who has the disks. */
export function ownerArguments(source: Exclude<Job["source"], { kind: "images" }>): string[] {
  if (source.kind !== "libvirt") return [`--${source.kind}`, source.socket];
  const { domain, connect } = source;
  return ["--libvirt", domain, ...(connect === undefined ? [] : ["--connect", connect])];
}

function verifyArguments({ verify }: Job): string[] {
  return verify === true ? ["--verify"] : [];
}

/** Whether both the backup and the one that it builds on have a bitmap, of which one is still to end. */
export function hasTwoBitmaps({ commands }: Plan): boolean {
  return commands.some(({ args }) => args.includes(KEEPS_BASE));
}

/** The chain that ends with this backup has its bitmap by its last file. */
function replacedArguments(disks: readonly PlannedDisk[]): string[] {
  return disks.flatMap(({ history }) => {
    const last = history.at(-1);
    return last?.qemu_bitmap === true ? ["--bitmap-replaces", last.path] : [];
  });
}

interface Basis {
  parents: KnownBackup[];
  /** Undefined: QEMU's bitmaps, which go by the parents' files. */
  checkpoint: string | undefined;
}

function incrementalArguments({ parents, checkpoint }: Basis): string[] {
  // By its name alone: the folder may be moved as a whole.
  return [
    ...(checkpoint === undefined ? [] : ["--since", checkpoint]),
    ...parents.flatMap(({ file }) => ["-b", file]),
    "-B",
    "qcow2",
    "-O",
    "qcow2",
  ];
}

function basisOf(
  job: Job,
  disks: readonly PlannedDisk[],
  start: Date,
  fullBecause: string | undefined,
): Basis | { why: string } {
  if (fullBecause !== undefined) return { why: fullBecause };
  if (job.level === "full") return { why: "the job asks for it" };
  const parents: KnownBackup[] = [];
  for (const { label, history } of disks) {
    const last = history.at(-1);
    if (last === undefined) return { why: `there is no earlier backup of ${label}` };
    const chain = chainOf(last, history);
    if (chain === undefined) return { why: `${last.file} builds on a backup that is gone` };
    const hasBitmaps = isOfQemu(job.source);
    const isKnown = hasBitmaps ? last.qemu_bitmap === true : last.checkpoint !== null;
    if (!isKnown) return { why: `${last.file} has no ${hasBitmaps ? "bitmap" : "checkpoint"}` };
    if (chain.length >= MAX_CHAIN)
      return { why: `the chain has ${chain.length} backups, the most there may be` };
    const ageMs = start.getTime() - Date.parse(chain[0]?.t0 ?? "");
    if (ageMs >= job.fullEveryMs) return { why: `the last full one is older than full-every` };
    parents.push(last);
  }
  const [first] = parents;
  const isOther = (parent: KnownBackup): boolean =>
    parent.checkpoint !== first?.checkpoint || parent.t0 !== first.t0;
  if (parents.some(isOther)) return { why: "the disks' last backups are of different times" };
  return { parents, checkpoint: first?.checkpoint ?? undefined };
}

function isQcow2({ options }: Job, target: string): boolean {
  const format = options.find((option) => option.startsWith("--target-format="));
  return format === undefined ? /\.qcow2?$/i.test(target) : format.endsWith("=qcow2");
}

/** Names of checkpoints that a job has made, and only those. */
export function checkpointName(job: string, date: string): string {
  return `run.${job.replaceAll("+", "_")}.${date}`;
}

export function isCheckpointOf(job: string, name: string): boolean {
  const date = name.slice(checkpointName(job, "").length);
  return name === checkpointName(job, date) && /^\d{4}-\d\d-\d\dT\d{6}Z$/.test(date);
}

function refuseSameTarget(disks: readonly PlannedDisk[]): void {
  const targets = disks.map(({ target }) => target);
  const repeated = targets.find((target, index) => target !== "null:" && targets.indexOf(target) !== index);
  if (repeated === undefined) return;
  throw new CowcatcherError({
    code: "USAGE",
    object: basename(repeated),
    problem: "would be the backup of two disks",
    hint: "put {disk} into the job's target",
  });
}

function noBasis({ name }: Job, why: string): CowcatcherError {
  return new CowcatcherError({
    code: "NO_BASIS",
    object: name,
    problem: `no incremental backup can be made: ${why}`,
    hint: "give level: auto, or make a full one first",
  });
}
