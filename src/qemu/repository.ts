// Disks of a guest that QEMU runs as one backup in a repository, and how much of each is read. Main thread.
//
// Each backup has an id for its T0, which is in its manifest (`checkpoint`) and in the name of the bitmap that QEMU keeps for
// the next one (bitmaps.ts). So "changed since" means since the group's very last backup, or nothing: after one that was
// forgotten, made elsewhere, or ended between its manifest and its bitmap, all is read.
//
//   the group's last backup is read, its chunks are claimed and looked for ─► is its bitmap there? ─► T0
//     ─► a chunk is read if a byte of it is dirty, or if the store has lost it
//
// One chain for each disk of each group: with a good backup all other bitmaps of the group on that disk go. A disk whose
// QEMU keeps no bitmaps is backed up all the same.

import { randomUUID } from "node:crypto";
import type { DirtyRuns } from "../backup/copy/incremental.js";
import type { BasisInfo } from "../backup/host.js";
import { AUTO_HINT, basisOf, byChunks, notIncremental } from "../backup/job/repository-backup.js";
import type { LevelChoice } from "../backup/options.js";
import { CowcatcherError } from "../errors.js";
import { BackupSession, type SessionDisk } from "../repository/backup/session.js";
import type { BackupLevel } from "../repository/format/manifest.js";
import type { Repository } from "../repository/repository.js";
import { RepositoryTarget } from "../target/repository/target.js";
import type { FoundDisk, MadeDisk } from "./backup.js";
import { type BitmapChain, bitmapOfBackup, bitmapsOfGroup } from "./bitmaps.js";

const NS_PER_MS = 1_000_000n;

export interface GuestSessionRequest {
  group: string;
  level: LevelChoice;
  /** QEMU keeps bitmaps for the next backup. */
  keepsBitmaps: boolean;
  vmConfig?: string | undefined;
  tool: string;
  /** What a disk of the guest is called in the backup. */
  nameOf: (disk: string) => string;
}

export class GuestSession {
  readonly #repository: Repository;
  readonly #request: GuestSessionRequest;
  readonly #checkpoint = randomUUID();
  #session: BackupSession | undefined;
  readonly disks: SessionDisk[] = [];
  /** As in the manifest. */
  level: { level: BackupLevel; reason: string } = { level: "full", reason: "" };

  constructor(repository: Repository, request: GuestSessionRequest) {
    this.#repository = repository;
    this.#request = request;
  }

  /** From `makeDisks` on. */
  get session(): BackupSession | undefined {
    return this.#session;
  }

  /** Before T0. @throws CowcatherError as BackupSession.begin and addDisk; NO_BASIS */
  async makeDisks(found: readonly FoundDisk[]): Promise<readonly MadeDisk[]> {
    const { group, vmConfig, tool, nameOf, keepsBitmaps } = this.#request;
    const session = await BackupSession.begin(this.#repository, {
      group,
      vmConfig,
      tool,
      diskCount: found.length,
      totalBytes: found.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0),
      checkpoint: keepsBitmaps ? this.#checkpoint : undefined,
    });
    this.#session = session;
    return found.map(({ name, sizeBytes, format }) => {
      const disk = session.addDisk(nameOf(name), sizeBytes, format);
      this.disks.push(disk);
      return this.#made(session, disk);
    });
  }

  #made(session: BackupSession, disk: SessionDisk): MadeDisk {
    const basis = basisOf(session, disk);
    const chain = this.#request.keepsBitmaps ? this.#chain(session, disk, basis) : undefined;
    const decided = ({ level, reason = "all of the disk was read" }: BasisInfo): void => {
      if (level === "incremental" && "index" in basis) {
        disk.takeOver(basis.index);
        this.#setLevel(session, level, `what has changed since ${basis.time}`);
      } else {
        this.#setLevel(session, "full", reason);
      }
    };
    if (chain === undefined) {
      const { level } = this.#request;
      const reason = "QEMU is to keep no bitmaps (--bitmap none)";
      if (level === "incremental") throw notIncremental(disk.name, reason);
      this.#setLevel(session, "full", level === "full" ? "as asked" : reason);
    }
    return {
      target: new RepositoryTarget(disk, "side-by-side"),
      chain,
      decided,
      dirtyOf: (runs: DirtyRuns) => ("index" in basis ? byChunks(runs, basis.isThere, disk) : runs),
    };
  }

  /** The first disk that is not incremental makes the backup a full one. */
  #setLevel(session: BackupSession, level: BackupLevel, reason: string): void {
    session.setLevel(level, reason);
    if (this.level.reason === "" || level === "full") this.level = { level, reason };
  }

  /** @throws CowcatcherError NO_BASIS where an incremental backup is asked for and cannot be made. */
  #chain(session: BackupSession, disk: SessionDisk, basis: ReturnType<typeof basisOf>): BitmapChain {
    const { group, level } = this.#request;
    const { id } = this.#repository.config;
    const nameOf = (checkpoint: string): string => bitmapOfBackup(id, { group, disk: disk.name, checkpoint });
    const chain = {
      id: bitmapsOfGroup(id, group),
      orFull: level !== "incremental",
      isOptional: true,
      hint: AUTO_HINT,
      mayEnd: true,
      isEnded: (bitmap: string) => bitmap.startsWith(bitmapsOfGroup(id, group)),
      ownBitmap: () => nameOf(this.#checkpoint),
    };
    const full = (bitmapAction: BasisInfo["bitmapAction"], reason: string): BitmapChain => {
      if (level === "incremental") throw notIncremental(disk.name, reason);
      return { ...chain, base: undefined, fullBecause: { bitmapAction, reason } };
    };
    if (level === "full") return full("new", "as asked");
    if ("why" in basis) return full("new", basis.why);
    const last = `the group's last backup, ${basis.time}`;
    const checkpoint = session.parent?.manifest.checkpoint ?? null;
    if (checkpoint === null) return full("missing", `no bitmap was kept from ${last}, on`);
    return { ...chain, base: { name: last, bitmap: () => nameOf(checkpoint) } };
  }

  started(t0Ms: number): void {
    this.#session?.started(BigInt(Math.round(t0Ms)) * NS_PER_MS);
  }

  /** Gives up what is not complete. Never rejects. */
  async end(object: string): Promise<void> {
    const problem = "the backup was given up";
    await this.#session?.abort(new CowcatcherError({ code: "CANCELLED", object, problem }));
  }
}
