// libvirt's checkpoints as the chain of a domain's incremental backups (`--bitmap auto`).
//
// A checkpoint is made in the call that begins the backup, in QEMU's one transaction: what it records begins at T0
// exactly. It cannot get another name later, so it has its last one at once, made from the files of the backup (their paths
// and inodes, which they have before they have their names): no file that is not that backup leads to it.
//
//   begin (new checkpoint, changes since the old one) ─► good: the old one is deleted
//                                                     └► else: the new one is deleted, and the old one has gone on recording
//
// libvirt's bitmaps all go on recording, each for itself, so that deleting one takes nothing from the others. The checkpoint's
// description says which run made it and for which files: what a run that died has left can be told from what is in use.

import { createHash } from "node:crypto";
import type { BasisInfo } from "../backup/host.js";
import { CowcatcherError, toCowcatcherError } from "../errors.js";
import { type BitmapChain, bitmapOfFile, withoutBitmap } from "../qemu/bitmaps.js";
import { isAlive, runOf } from "../qemu/names.js";
import { isJsonObject } from "../qmp/protocol.js";
import { type Virsh, VirshError } from "./virsh.js";
import { childOf, parseXml } from "./xml.js";

const PREFIX = "cowcatcher-checkpoint-";
const HASH_DIGITS = 16;
/** Each costs every write of the guest a little, as in qemu/bitmaps.ts. */
const CHECKPOINTS_MAX = 16;

/** A disk, and what says which backup of it: the name of a bitmap (qemu/bitmaps.ts). */
export type BackupOfDisk = readonly [disk: string, bitmap: string];

/** The checkpoint of the backup that these files are together. */
export function checkpointName(files: readonly BackupOfDisk[]): string {
  const lines = files.map(([disk, bitmap]) => `${disk}\0${bitmap}`).sort();
  const hash = createHash("sha256").update(lines.join("\n")).digest("hex");
  return `${PREFIX}${hash.slice(0, HASH_DIGITS)}`;
}

export interface CheckpointBasis {
  /** What the backup builds on; undefined: it is a full one. */
  old: string | undefined;
  /** Checkpoints on which nothing will be built when this backup is good: they go then. */
  ended: readonly string[];
  info: BasisInfo;
  /** No checkpoint is made for the next backup. */
  keepsNone?: boolean;
}

/**
 * How much is to be copied, and why. It is the same for all disks, as their checkpoint is one.
 * @param chains of all disks, in the order of `disks`
 * @throws CowcatcherError NO_BASIS where that must not be all; LIMIT
 */
export async function findBasis(
  virsh: Virsh,
  disks: readonly { name: string }[],
  chains: readonly BitmapChain[],
): Promise<CheckpointBasis> {
  const names = await listCheckpoints(virsh);
  const full = async (info: Omit<BasisInfo, "level">): Promise<CheckpointBasis> => {
    const ended = await endedCheckpoints(virsh, chains);
    const count = names.filter((name) => name.startsWith(PREFIX)).length - ended.length;
    const basis = { old: undefined, ended, info: { level: "full" as const, ...info } };
    return count < CHECKPOINTS_MAX ? basis : withoutCheckpoint(chains, tooMany(virsh.domain, count), basis);
  };
  const bases = chains.flatMap(({ base }) => base ?? []);
  if (bases.length < chains.length) {
    const because = chains.find(({ base }) => base === undefined)?.fullBecause;
    return full({ bitmapAction: "new", ...because });
  }
  const name = checkpointName(bases.map((base, index) => [disks[index]?.name ?? "", base.bitmap()]));
  const isThere = names.includes(name);
  const since = [...new Set(bases.map((base) => base.name))].join(" and ");
  const reason = isThere
    ? await defectOf(virsh, name)
    : `libvirt has no checkpoint of what has changed since ${since}`;
  if (reason === undefined) {
    const keepsOld = chains.some(({ keepsBase }) => keepsBase === true);
    // Of a chain of files none but the base is ended by what builds on it.
    const isOfFiles = chains.every(({ id }) => id === undefined);
    const others = isOfFiles ? [] : (await endedCheckpoints(virsh, chains)).filter((other) => other !== name);
    const info = { level: "incremental", bitmapAction: "used" } as const;
    return { old: name, ended: keepsOld ? others : [name, ...others], info };
  }
  if (!chains.every(({ orFull }) => orFull)) {
    const hint = chains[0]?.hint;
    throw new CowcatcherError({ code: "NO_BASIS", object: virsh.domain, problem: reason, hint });
  }
  return full({ bitmapAction: isThere ? "invalid" : "missing", reason });
}

/** The basis of a backup without a checkpoint for the next one. @throws CowcatcherError the obstacle, where there has to be one */
export function withoutCheckpoint(
  chains: readonly BitmapChain[],
  obstacle: CowcatcherError,
  basis: Pick<CheckpointBasis, "info"> = { info: { level: "full", bitmapAction: "not-used" } },
): CheckpointBasis {
  const isOptional = chains.every((chain) => chain.isOptional && chain.orFull);
  return withoutBitmap(basis, obstacle, { isOptional });
}

/** Those on whose backups nothing will be built once this one is good. */
async function endedCheckpoints(virsh: Virsh, chains: readonly BitmapChain[]): Promise<string[]> {
  const [chain] = chains;
  if (chain === undefined || !chains.some(({ mayEnd }) => mayEnd)) return [];
  if (chain.id === undefined) {
    return checkpointsOfFiles(virsh, (bitmap) => chains.some((other) => other.isEnded(bitmap)));
  }
  const own = await ownCheckpoints(virsh);
  return own.filter(({ origin }) => origin.chain === chain.id).map(({ name }) => name);
}

/** Those of backups of which nothing but files with these bitmaps is. */
export async function checkpointsOfFiles(
  virsh: Virsh,
  isOne: (bitmap: string) => boolean,
): Promise<string[]> {
  const own = (await ownCheckpoints(virsh)).filter(
    ({ name, origin }) => origin.chain === undefined && isComplete(name, origin),
  );
  return own
    .filter(({ origin }) => origin.targets.every(({ path }) => isOne(bitmapOfFile(path))))
    .map(({ name }) => name);
}

function tooMany(object: string, count: number): CowcatcherError {
  return new CowcatcherError({
    code: "LIMIT",
    object,
    problem: `it has ${count} checkpoints named ${PREFIX}… already, one for each backup that is built on`,
    hint: "delete those of backups that nothing builds on: virsh checkpoint-delete",
  });
}

/** Names of all checkpoints of the domain. @throws as Virsh.run */
async function listCheckpoints(virsh: Virsh): Promise<string[]> {
  return (await virsh.run("checkpoint-list", "--name")).split("\n").filter((name) => name !== "");
}

/** libvirt counts what each of its bitmaps calls changed: of one that is gone it says nothing. */
async function defectOf(virsh: Virsh, name: string): Promise<string | undefined> {
  const text = await virsh.run("checkpoint-dumpxml", `--checkpointname=${name}`, "--no-domain", "--size");
  const disks = childOf(parseXml(text, name), "disks")?.children ?? [];
  const broken = disks.find(
    ({ attributes }) => attributes.get("checkpoint") === "bitmap" && !attributes.has("size"),
  );
  if (broken === undefined) return undefined;
  const disk = broken.attributes.get("name") ?? "";
  return `what the checkpoint ${name} recorded of ${disk} is gone, or broken`;
}

/** The words of libvirt where a checkpoint cannot be built on (VIR_ERR_CHECKPOINT_INCONSISTENT), in ours. */
export function asMissingBasis(error: unknown, base: string | undefined, hint: string): unknown {
  if (
    base === undefined ||
    !(error instanceof VirshError) ||
    !/checkpoint inconsistent/i.test(error.complaint)
  )
    return error;
  return new CowcatcherError({
    code: "NO_BASIS",
    object: error.object,
    problem: `the checkpoint ${base} cannot be used: ${error.complaint}`,
    hint,
    cause: error,
  });
}

/** Which run made a checkpoint, and for which files. */
export interface CheckpointOrigin {
  run: string;
  targets: readonly { disk: string; path: string }[];
  /** Of a backup in a repository, which has no files: whose one it is. */
  chain?: string | undefined;
}

export function describeOrigin(origin: CheckpointOrigin): string {
  return JSON.stringify(origin);
}

/** What `describeOrigin` wrote; undefined: somebody else did. */
export function readOrigin(description: string): CheckpointOrigin | undefined {
  let found: unknown;
  try {
    found = JSON.parse(description);
  } catch {
    return undefined;
  }
  if (!isJsonObject(found)) return undefined;
  const { run, targets, chain } = found;
  if (typeof run !== "string" || runOf(run) !== run || !Array.isArray(targets)) return undefined;
  const read = targets
    .filter(isJsonObject)
    .map(({ disk, path }) => ({ disk: String(disk), path: String(path) }));
  return typeof chain === "string" ? { run, targets: read, chain } : { run, targets: read };
}

/** That it is gone already is as good. @throws CowcatcherError as Virsh.run */
export async function deleteCheckpoint(virsh: Virsh, name: string): Promise<void> {
  try {
    await virsh.run("checkpoint-delete", `--checkpointname=${name}`);
  } catch (error) {
    if (!(error instanceof VirshError) || !/checkpoint not found/i.test(error.complaint)) throw error;
  }
}

/** Checkpoints that our runs made, with what made them. @throws CowcatcherError as Virsh.run; PROTOCOL */
export async function ownCheckpoints(virsh: Virsh): Promise<{ name: string; origin: CheckpointOrigin }[]> {
  const found: { name: string; origin: CheckpointOrigin }[] = [];
  for (const name of (await listCheckpoints(virsh)).filter((name) => name.startsWith(PREFIX))) {
    const text = await virsh.run("checkpoint-dumpxml", `--checkpointname=${name}`, "--no-domain");
    const origin = readOrigin(childOf(parseXml(text, name), "description")?.text ?? "");
    if (origin !== undefined) found.push({ name, origin });
  }
  return found;
}

/** Those of runs that are over. @throws as ownCheckpoints */
export async function deadCheckpoints(virsh: Virsh): ReturnType<typeof ownCheckpoints> {
  return (await ownCheckpoints(virsh)).filter(({ origin }) => !isAlive(origin.run));
}

/**
 * Whether the backup that the checkpoint is of stands under its names, all of it. One in a repository, which cannot be looked
 * into from here, counts as there: the next backup of its group ends what is not built on.
 */
export function isComplete(name: string, { targets, chain }: CheckpointOrigin): boolean {
  if (chain !== undefined) return true;
  try {
    return checkpointName(targets.map(({ disk, path }) => [disk, bitmapOfFile(path)])) === name;
  } catch (error) {
    if (toCowcatcherError(error, name).code === "NO_BASIS") return false;
    throw error;
  }
}
