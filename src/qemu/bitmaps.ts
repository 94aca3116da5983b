// QEMU's dirty bitmaps as the chain of a disk's incremental backups (`--bitmap auto`).
//
// A bitmap belongs to one backup: it says what was written since that backup's T0, and its name says which backup that is,
// by a hash of the target's path and inode (a file that was written anew under the same name is another backup), or by two,
// of repository and group and of the checkpoint that is in the backup's manifest and nowhere else:
//
//   cowcatcher-bitmap-HASH                     what has changed since the T0 of the backup HASH
//   cowcatcher-bitmap-GROUP-HASH               the same of a backup in a repository
//   cowcatcher-PID.STARTb0.cowcatcher-bitmap-…  while a backup runs: what changes since its own T0, and whose heir it is
//
// No write may be lost between the two, and T0 by the method `filter` is no part of a transaction. So the new one begins
// before T0 and the old one ends after it; what falls between is in both:
//
//   add new ─► T0 ─► disable old ─► copy what old calls dirty ─► good: in one transaction new gets its name, old goes
//                                                              └► else: in one transaction old gets all of new, and records again
//
// Where the backup is still to be looked at by somebody else, both stay when it is good (keepsBase): old has all that new has
// and records again, until one of the two is ended by its backup's file (endBitmaps).
//
// The first backup of a chain has no old one; one that begins a chain in the place of another ends the bitmaps of the backups
// that it is told of, in the transaction that names its own. A group of a repository has one chain for each disk. In
// qcow2 disks bitmaps are persistent; with others they end with QEMU. After a
// crash in between, cleanup.ts gives back by the name. A bitmap that QEMU calls inconsistent, or that does not record, has
// missed writes: it is not used.

import { createHash } from "node:crypto";
import { existsSync, realpathSync, statSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import type { BasisInfo } from "../backup/host.js";
import { CowcatcherError } from "../errors.js";
import { type JsonObject, QmpError } from "../qmp/protocol.js";
import type { Target } from "../target/target.js";
import type { QemuBitmap, QemuNode } from "./graph.js";
import type { Visit } from "./monitor.js";
import { bitmapWorkName } from "./names.js";

const PREFIX = "cowcatcher-bitmap-";
const HASH_DIGITS = 16;
/** Each costs every write of the guest a little; more than this is a chain begun again and again. */
const BITMAPS_MAX = 16;

/** What is asked of the bitmaps of one disk whose target is a file. */
export interface BitmapWish {
  /** The backup that this one builds on; undefined: a full one, which begins a chain. */
  base: string | undefined;
  /** Where the base's bitmap cannot be used, all is copied. */
  orFull: boolean;
  /** Backups on which nothing will be built any more once this one is good; their bitmaps go then. */
  replaced?: readonly string[] | undefined;
  /** The base's bitmap goes on when this backup is good, so that another one can be built on the base. */
  keepsBase?: boolean | undefined;
}

/** The backups of one disk, each with its bitmap: files (chainOfFiles), or what a repository has (repository.ts). */
export interface BitmapChain {
  /** What this backup builds on; undefined: nothing. */
  readonly base: BaseBackup | undefined;
  /** Why there is no base, where somebody is to be told. */
  readonly fullBecause?: Pick<BasisInfo, "bitmapAction" | "reason"> | undefined;
  /** Where the base's bitmap cannot be used, all is copied. */
  readonly orFull: boolean;
  /** Without a bitmap for the next one this backup is as good. */
  readonly isOptional: boolean;
  /** What to do where the base's bitmap cannot be used, for the user. */
  readonly hint: string;
  /** Among chains: of libvirt's checkpoints. Undefined: the chain is known by its files. */
  readonly id?: string | undefined;
  /** The base's bitmap goes on when this backup is good. */
  readonly keepsBase?: boolean | undefined;
  /** Some bitmap may be one that `isEnded` calls so. */
  readonly mayEnd: boolean;
  /** Whether nothing will be built on the bitmap's backup any more once this one is good. The base's own is not asked about. */
  isEnded(bitmap: string): boolean;
  /** The bitmap that is to be this backup's, whose target is prepared. */
  ownBitmap(target: Target): string;
}

export interface BaseBackup {
  /** For people. */
  readonly name: string;
  /** @throws CowcatcherError NO_BASIS where there is no such backup */
  bitmap(): string;
}

/** @param target path of the backup that is made */
export function chainOfFiles(
  { base, orFull, replaced = [], keepsBase }: BitmapWish,
  target: string,
): BitmapChain {
  const ended = bitmapsOfFiles(replaced);
  return {
    keepsBase,
    base: base === undefined ? undefined : { name: base, bitmap: () => bitmapOfFile(base) },
    orFull,
    isOptional: false,
    hint: "make a full backup with --bitmap auto and without -b, or give --since-or-full",
    mayEnd: ended.size > 0,
    isEnded: (bitmap) => ended.has(bitmap),
    ownBitmap: (made) => bitmapOfTarget(target, made),
  };
}

export interface BitmapBasis {
  /** Of the base; undefined: a full backup. */
  old: string | undefined;
  /** The old one goes on, too. */
  keepsOld?: boolean | undefined;
  /** Bitmaps on whose backups nothing will be built; they end with a good backup. */
  ended: readonly string[];
  info: BasisInfo;
  /** No bitmap is made for the next backup. */
  keepsNone?: boolean;
}

/** How much is to be copied, and why. @throws CowcatcherError NO_BASIS where that must not be all; BUSY; LIMIT */
export function findBitmapBasis(disk: string, node: QemuNode, chain: BitmapChain): BitmapBasis {
  const { base, orFull } = chain;
  const full = (info: Omit<BasisInfo, "level">): BitmapBasis => {
    const ended = endedBitmaps(node, (name) => chain.isEnded(name));
    return { old: undefined, ended, info: { level: "full", ...info } };
  };
  if (base === undefined) {
    const found = full({ bitmapAction: "new", ...chain.fullBecause });
    const count = node.bitmaps.filter(({ name }) => name.startsWith(PREFIX)).length - found.ended.length;
    return count < BITMAPS_MAX ? found : withoutBitmap(found, tooMany(disk, count), chain);
  }
  const name = base.bitmap();
  const bitmap = node.bitmaps.find((found) => found.name === name);
  if (bitmap?.isBusy === true) {
    const problem = "another job or export uses the bitmap of its last backup";
    throw new CowcatcherError({ code: "BUSY", object: disk, problem, hint: "wait for its end" });
  }
  const obstacle = obstacleOf(bitmap, base.name);
  if (obstacle === undefined) {
    const ended = endedBitmaps(node, (other) => other !== name && chain.isEnded(other));
    const info = { level: "incremental", bitmapAction: "used" } as const;
    return { old: name, keepsOld: chain.keepsBase, ended, info };
  }
  if (!orFull) {
    throw new CowcatcherError({ code: "NO_BASIS", object: disk, problem: obstacle, hint: chain.hint });
  }
  return full({ bitmapAction: bitmap === undefined ? "missing" : "invalid", reason: obstacle });
}

/** One in use is left alone. */
function endedBitmaps({ bitmaps }: QemuNode, isEnded: (bitmap: string) => boolean): string[] {
  return bitmaps.filter(({ name, isBusy }) => !isBusy && isEnded(name)).map(({ name }) => name);
}

/** A backup that is gone has no name any more by which its bitmap could be found. */
export function bitmapsOfFiles(files: readonly string[]): ReadonlySet<string> {
  return new Set(files.filter((path) => existsSync(path)).map(bitmapOfFile));
}

function tooMany(object: string, count: number): CowcatcherError {
  return new CowcatcherError({
    code: "LIMIT",
    object,
    problem: `it has ${count} bitmaps named ${PREFIX}… already, one for each backup that is built on`,
    hint: "remove those of backups that nothing builds on: QMP's block-dirty-bitmap-remove",
  });
}

/** The basis of a backup that QEMU keeps no bitmap for. @throws CowcatcherError the obstacle, where there has to be one */
export function withoutBitmap(
  { info }: Pick<BitmapBasis, "info">,
  obstacle: CowcatcherError,
  { isOptional }: Pick<BitmapChain, "isOptional">,
): BitmapBasis {
  if (!isOptional || info.level === "incremental") throw obstacle;
  const note = `no bitmap is kept for the next one: ${obstacle.object}: ${obstacle.problem}`;
  const reason = info.reason === undefined ? note : `${info.reason}; ${note}`;
  return {
    old: undefined,
    ended: [],
    info: { level: "full", bitmapAction: "not-used", reason },
    keepsNone: true,
  };
}

function obstacleOf(bitmap: QemuBitmap | undefined, base: string): string | undefined {
  if (bitmap === undefined) return `QEMU has no bitmap of what has changed since ${base}`;
  if (bitmap.isInconsistent) return `the bitmap of ${base} is inconsistent: QEMU did not end in good order`;
  if (!bitmap.isRecording) return `the bitmap of ${base} has not recorded all that was written`;
  return undefined;
}

/** Of a backup that is there. @throws CowcatcherError NO_BASIS where there is no such file */
export function bitmapOfFile(path: string): string {
  try {
    const real = realpathSync(path);
    return nameOf(real, statSync(real).ino);
  } catch (cause) {
    const problem = "cannot be found, so nothing can be built on it";
    throw new CowcatcherError({ code: "NO_BASIS", object: path, problem, cause });
  }
}

/** Of the backup that is being made: its file has its inode already, if not its name. */
export function bitmapOfTarget(path: string, { unfinishedPath }: Target): string {
  if (unfinishedPath === null) return nameOf(path, 0);
  return nameOf(join(realpathSync(dirname(path)), basename(path)), statSync(unfinishedPath).ino);
}

function nameOf(path: string, inode: number): string {
  return PREFIX + hashOf(path, inode);
}

function hashOf(...parts: readonly (string | number)[]): string {
  return createHash("sha256").update(parts.join("\0")).digest("hex").slice(0, HASH_DIGITS);
}

/** What the names of all bitmaps of a repository's group begin with. */
export function bitmapsOfGroup(repositoryId: string, group: string): string {
  return `${PREFIX}${hashOf(repositoryId, group)}-`;
}

/** @param checkpoint what the backup's manifest calls its T0 */
export function bitmapOfBackup(
  repositoryId: string,
  { group, disk, checkpoint }: { group: string; disk: string; checkpoint: string },
): string {
  return bitmapsOfGroup(repositoryId, group) + hashOf(checkpoint, disk);
}

/** The bitmaps of one disk from before T0 to the end of its backup. */
export class BitmapHandover {
  readonly old: string | undefined;
  readonly #node: string;
  readonly #work: string;
  readonly #next: string;
  readonly #persistent: boolean;
  readonly #ended: readonly string[];
  readonly #keepsOld: boolean;
  /** Something is to be handed over or given back. */
  isOpen = false;

  constructor(
    node: QemuNode,
    { old, ended, keepsOld = false }: Pick<BitmapBasis, "old" | "ended" | "keepsOld">,
    next: string,
    run: string,
    index: number,
  ) {
    this.#node = node.name;
    this.old = old;
    this.#ended = ended;
    this.#keepsOld = keepsOld;
    this.#next = next;
    this.#work = bitmapWorkName(run, index, old);
    this.#persistent = node.driver === "qcow2";
  }

  /**
   * Before T0; giveBack is the caller's.
   * @throws CowcatcherError NO_BASIS where QEMU keeps no bitmap of such a disk; IO
   */
  async begin(visit: Visit): Promise<void> {
    this.isOpen = true;
    try {
      await transaction(visit, [this.#add(this.#work)]);
    } catch (cause) {
      if (!(cause instanceof QmpError)) throw cause;
      this.isOpen = false;
      throw new CowcatcherError({
        code: "NO_BASIS",
        object: this.#node,
        problem: `QEMU cannot keep a bitmap of it: ${cause.desc}`,
        hint: "leave out --bitmap: a full backup needs none",
        cause,
      });
    }
  }

  /** After T0. */
  async endOld(visit: Visit): Promise<void> {
    if (this.old !== undefined) await transaction(visit, [action("disable", this.#node, this.old)]);
  }

  /** The backup is good. @throws CowcatcherError: nothing has changed */
  async succeed(visit: Visit): Promise<void> {
    if (!this.isOpen) return;
    await transaction(visit, [
      this.#add(this.#next),
      merge(this.#node, this.#next, this.#work),
      ...this.#oldsEnd(),
      action("remove", this.#node, this.#work),
      ...this.#ended.map((name) => action("remove", this.#node, name)),
    ]);
    this.isOpen = false;
  }

  #oldsEnd(): JsonObject[] {
    const { old } = this;
    if (old === undefined) return [];
    if (!this.#keepsOld) return [action("remove", this.#node, old)];
    return [action("enable", this.#node, old), merge(this.#node, old, this.#work)];
  }

  /** There is no backup: all is as if it had not been tried. Idempotent. @throws CowcatcherError */
  async giveBack(visit: Visit): Promise<void> {
    if (!this.isOpen) return;
    await giveBackBitmap(visit, this.#node, this.#work, this.old);
    this.isOpen = false;
  }

  #add(name: string): JsonObject {
    const data = { node: this.#node, name, persistent: this.#persistent };
    return { type: "block-dirty-bitmap-add", data };
  }
}

/** Also what a dead run has left. A bitmap that was never made is as good as given back. @throws CowcatcherError */
export async function giveBackBitmap(
  visit: Visit,
  node: string,
  work: string,
  old: string | undefined,
): Promise<void> {
  const nodes = await visit.list("query-named-block-nodes", { flat: true });
  const bitmaps = nodes.find((found) => found["node-name"] === node)?.["dirty-bitmaps"];
  const names = Array.isArray(bitmaps) ? bitmaps.map((found: JsonObject) => found["name"]) : [];
  const hasWork = names.includes(work);
  const toOld =
    old === undefined || !names.includes(old)
      ? []
      : [action("enable", node, old), ...(hasWork ? [merge(node, old, work)] : [])];
  const actions = [...toOld, ...(hasWork ? [action("remove", node, work)] : [])];
  if (actions.length > 0) await transaction(visit, actions);
}

/**
 * Ends the bitmaps of backups that nothing will be built on; names of those that there were.
 * @param files of the backups, which have to be there: by them their bitmaps are found
 * @throws CowcatcherError
 */
export async function endBitmaps(
  visit: Visit,
  nodes: Iterable<QemuNode>,
  files: readonly string[],
): Promise<string[]> {
  const ended: string[] = [];
  const given = bitmapsOfFiles(files);
  for (const node of nodes) {
    const names = endedBitmaps(node, (name) => given.has(name));
    if (names.length > 0)
      await transaction(
        visit,
        names.map((name) => action("remove", node.name, name)),
      );
    ended.push(...names);
  }
  return ended;
}

function action(what: "enable" | "disable" | "remove", node: string, name: string): JsonObject {
  return { type: `block-dirty-bitmap-${what}`, data: { node, name } };
}

function merge(node: string, target: string, bitmap: string): JsonObject {
  return { type: "block-dirty-bitmap-merge", data: { node, target, bitmaps: [bitmap] } };
}

async function transaction(visit: Visit, actions: readonly JsonObject[]): Promise<void> {
  await visit.execute("transaction", { actions: [...actions] });
}
