// What crosses between the main thread and a storage thread (workers/storage.ts): calls by name, with their answers.
//
// Objects stay where they were made and are known by number: a target, an opened backing chain, a spill file.

import type { ErrorDetails } from "../../errors.js";
import type { SessionRequest } from "../../repository/backup/session.js";
import type { BackupLevel } from "../../repository/format/manifest.js";
import type { TargetDescription, TargetOptions } from "../../target/target.js";
import type { InUseParts, TargetPlace } from "../guard/target-guard.js";
import type { RepositoryPlace } from "../options.js";

/** A target as the main thread sees it. */
export interface MadeTarget {
  id: number;
  name: string;
  granularityBytes: number;
  description: TargetDescription;
  workerLimit: number | undefined;
  /** It is to hear of it when a worker has written (Target.workersAreIn). */
  awaitsWorkers: boolean;
  /** Target.commitWaits */
  commitWaits: boolean;
  unfinishedPath: string | null;
  temporaryPaths: readonly string[];
}

/** A disk of a backup in a repository. */
export interface MadeSessionDisk extends MadeTarget {
  /** One byte for each chunk of the last backup's disk, 1 where it is there to be taken over; null: there is no such disk. */
  takeable: Uint8Array | null;
}

/** A backup in a repository has begun (repository/backup/session.ts). */
export interface BegunSession {
  id: number;
  repositoryId: string;
  chunkBytes: number;
  /** The group's last backup. */
  parent: { time: string; checkpoint: string | null } | null;
}

export type SessionPlace = Omit<RepositoryPlace, "disk" | "level"> &
  Pick<SessionRequest, "diskCount" | "totalBytes" | "checkpoint">;

export interface BackedTarget {
  path: string;
  backingFile?: string | undefined;
  backingFormat?: TargetOptions["backingFormat"];
  /** The target gets what a guest overwrites: it may lie on the very disk that is backed up. */
  oldDataOnly?: boolean | undefined;
}

/** Bytes between a place in memory and one in the file. */
export interface SpillTransfer {
  fd: number;
  path: string;
  memory: SharedArrayBuffer;
  memoryOffset: number;
  lengthBytes: number;
  offsetBytes: number;
}

/** The calls, each with its argument and its result. */
export interface StorageCalls {
  /** @throws CowcatcherError as refuseImageAsTarget. Null for what cannot be a target: making it says why. */
  lookAtTarget(argument: { target: string; inUse: InUseParts }): Promise<TargetPlace | null>;
  /** @throws CowcatcherError as openBacking. @returns its number; null where the target builds on none */
  openBacking(argument: { target: BackedTarget; inUse: InUseParts }): Promise<number | null>;
  closeBacking(id: number): Promise<void>;
  /** `cancel`: a word that becomes 1 when the target is given up. @throws CowcatcherError as createTarget */
  makeTarget(argument: {
    options: Omit<TargetOptions, "isCancelled">;
    cancel: SharedArrayBuffer;
  }): Promise<MadeTarget>;
  workersAreIn(id: number): Promise<void>;
  completeTarget(id: number): Promise<void>;
  commitTarget(id: number): Promise<void>;
  abortTarget(id: number): Promise<void>;
  /** @throws CowcatcherError as openSpillFile */
  openSpill(argument: {
    spillDir: string | undefined;
    target: string;
  }): Promise<{ path: string; fd: number }>;
  writeSpill(argument: SpillTransfer): Promise<void>;
  readSpill(argument: SpillTransfer): Promise<void>;
  /** @throws CowcatcherError as Repository.open and BackupSession.begin */
  beginSession(place: SessionPlace): Promise<BegunSession>;
  /** The target's id is then one of makeTarget's. @throws CowcatcherError as BackupSession.addDisk */
  addSessionDisk(argument: {
    session: number;
    disk: string;
    sizeBytes: number;
    format: string;
  }): Promise<MadeSessionDisk>;
  /** An incremental disk takes over the last backup's chunks. */
  setSessionLevel(argument: {
    session: number;
    disk: string;
    level: BackupLevel;
    reason: string;
  }): Promise<void>;
  /** @param ns T0. @returns what the backup is called, and what the clock said where that was too early */
  startSession(argument: { session: number; ns: bigint }): Promise<{ time: string; clockBehind?: string }>;
  /** Whatever is not complete is given up. Never rejects. */
  endSession(session: number): Promise<void>;
  closeSpill(fd: number): Promise<void>;
}

export type StorageCall = keyof StorageCalls;
export type ArgumentOf<Call extends StorageCall> = Parameters<StorageCalls[Call]>[0];
export type ResultOf<Call extends StorageCall> = Awaited<ReturnType<StorageCalls[Call]>>;

export interface CallMessage {
  id: number;
  call: StorageCall;
  argument: unknown;
}

/** Errors cross as plain data: a class does not survive the port. */
export type AnswerMessage =
  { id: number; result: unknown } | { id: number; error: ErrorDetails; stack: string | undefined };

/** Where such calls are carried out, one after another as they come. */
export interface StorageHand {
  /** A call is on its way: one more would wait for it, and it may never end. */
  readonly isBusy: boolean;
  /** @throws CowcatcherError what the call says, or WORKER if the thread died. */
  call<Call extends StorageCall>(call: Call, argument: ArgumentOf<Call>): Promise<ResultOf<Call>>;
  /** It is not called any more: once what is on its way has ended it is another's. */
  release(): void;
}

/** Who has storage threads to give. */
export interface StorageHands {
  /** @throws CowcatcherError LIMIT when too many hang. */
  take(): StorageHand;
}
