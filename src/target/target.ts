// What a backup is written to. One thread makes, finishes or abandons a Target: in a server one that serves nobody
// (backup/storage), else the main thread. Each worker opens a TargetWriter (cow/target-writer.ts) on its description.
// Nothing else crosses: no message a cluster.

import type { RbdHandle, SourceDescription } from "../block/device.js";
import type { ImageFormat } from "../block/format.js";
import type { PatchingDescription } from "../repository/backup/disk-chunks.js";
import type { ChunkWriterDescription } from "../repository/backup/chunk-writer.js";
import type { SourceAccess } from "./file/attributes.js";
import type { Compression } from "../image/qcow2/format/compression.js";

export interface TargetOptions {
  /** Final path; the file is written beside it under a temporary name. "null:" throws all data away;
   *  "-" is standard output; an NBD URI names an export, which is written in place; an RBD address an image, made if it is not there. */
  path: string;
  format: ImageFormat;
  sizeBytes: number;
  /** Of a new qcow2 target, in bytes; a power of two, 512 to 2 MiB. */
  clusterSizeBytes: number;
  backingFile?: string | undefined;
  backingFormat?: ImageFormat | undefined;
  /** Of the clusters of a qcow2 target; undefined: none. */
  compression?: Compression | undefined;
  /** A raw TARGET that holds an older state of the disk: an existing file is written as it stands, and keeps its name. */
  inPlace?: boolean | undefined;
  /** Only what has changed is written: zeroes must be said, whatever the target shows where nothing is. */
  isPart?: boolean | undefined;
  /** Replace an existing file. */
  force: boolean;
  /** O_DIRECT for the data. */
  direct: boolean;
  /** Of an NBD target: how often a lost connection is made again. */
  targetRetries?: number | undefined;
  /** Of an RBD image: a snapshot to be made of it when all is written. */
  targetSnapshot?: string | undefined;
  /** Of the threads that work for an RBD image, librbd's own included, 0 to 19: a guest on this machine comes first. */
  niceness?: number | undefined;
  /** Of the source's files: only who may read all of them may read a new target. */
  sourceAccess?: readonly SourceAccess[] | undefined;
  /** Asked while a server's answer is awaited, and between two steps; true ends either with CANCELLED. */
  isCancelled?: (() => boolean) | undefined;
}

/** On one thread. */
export interface Target {
  readonly name: string;
  /** Smallest unit that writers take, in bytes (the qcow2 cluster size; 1 for raw). */
  readonly granularityBytes: number;
  readonly description: TargetDescription;
  /** Unit in which the target takes data best, in bytes: the copy's chunk. Undefined: the copy's own. */
  readonly chunkBytes?: number | undefined;
  /** commit() waits for a server: a cancel ends the wait, and abort() undoes what comes of it. */
  readonly commitMayHang?: boolean | undefined;
  /** commit() waits for other disks: abort() ends the wait, and which of both came first is what commit() says. */
  readonly commitWaits?: boolean | undefined;
  /** Most workers that may write at a time; undefined: any number. */
  readonly workerLimit?: number | undefined;
  /** A worker has written: what was kept open until then may go. Never rejects; may be called again. */
  workersAreIn?(): Promise<void>;
  /** T0 is now. Synchronous; does not throw. */
  started?(): void;
  /** Where a complete target can be read before it has its final name; null for `null:`. */
  readonly unfinishedPath: string | null;
  /** How a complete target is read before it has its final name, where that is not by the path. */
  readonly readBack?: SourceDescription | undefined;
  /** Names that are to go if the process ends before commit(). */
  readonly temporaryPaths?: readonly string[] | undefined;
  /** Writes what metadata is left and syncs: all of the target is on the medium then. */
  complete(): Promise<void>;
  /** After complete(): renames to the final name and syncs the folder. */
  commit(): Promise<void>;
  /** complete() and commit(). */
  finish(): Promise<void>;
  /** Removes the unfinished target. Never throws; may be called at any time, more than once. */
  abort(): Promise<void>;
  /** The same without a turn of the event loop, for the process's last moments. */
  abortSync(): void;
}

export interface RawTargetDescription {
  format: "raw";
  name: string;
  /** O_DIRECT if asked for. */
  fd: number;
  /** Never O_DIRECT, for what is not aligned; the same as `fd` unless `direct`. */
  bufferedFd: number;
  sizeBytes: number;
  direct: boolean;
  /** The target reads as zeroes where nothing was written (a new file), so zeroes need no write. */
  startsZeroed: boolean;
  /** See target/file/gate.ts. */
  shared: SharedArrayBuffer;
}

export interface Qcow2TargetDescription {
  format: "qcow2";
  name: string;
  /** For guest clusters (O_DIRECT if asked for). */
  dataFd: number;
  /** For tables: never O_DIRECT, as entries are written a few bytes at a time. */
  metadataFd: number;
  sizeBytes: number;
  direct: boolean;
  clusterBits: number;
  /** Where nothing is written it shows something else than zeroes: its backing file, or what it is laid upon later. */
  showsOther: boolean;
  /** As in RawTargetDescription; where false, L2 tables are zeroed when they are allocated. */
  startsZeroed: boolean;
  /** Layout: see target/qcow2/layout.ts. Next free host cluster, and the place of each L2 table. */
  shared: SharedArrayBuffer;
  compression: Compression | null;
  /** Of a compressed target, 16 bits a host cluster. */
  refcounts: SharedArrayBuffer | null;
}

export interface NullTargetDescription {
  format: "null";
  name: string;
}

export interface StdoutTargetDescription {
  format: "stdout";
  name: string;
  fd: number;
  sizeBytes: number;
}

export interface NbdTargetDescription {
  format: "nbd";
  name: string;
  /** Each worker makes a connection of its own to it. */
  uri: string;
  /** Of the disk; the export may be larger. */
  sizeBytes: number;
  /** Of the export. */
  exportBytes: number;
  /** How often a lost connection is made again before the flush at the end fails; writes are the caller's to retry. */
  retries: number;
  /** What read as zeroes before the copy began, so that zeroes need no write there (block/extent-map.ts). */
  zeroes: { runs: SharedArrayBuffer; runCount: number } | null;
  direct: false;
}

export interface RbdTargetDescription {
  format: "rbd";
  name: string;
  handle: RbdHandle;
  /** Of the disk; the image may be larger. */
  sizeBytes: number;
  /** As in RawTargetDescription. */
  startsZeroed: boolean;
  direct: false;
}

/** A disk of a backup in a repository. */
export interface RepositoryTargetDescription {
  format: "repository";
  name: string;
  sizeBytes: number;
  chunkBytes: number;
  /** 32 bytes a chunk: its id, or zeroes for a hole; and a byte: where it stands (repository/backup/disk-chunks.ts). */
  ids: SharedArrayBuffer;
  states: SharedArrayBuffer;
  patching: PatchingDescription | null;
  writer: ChunkWriterDescription;
  /** Answers take their time whatever the processor does. */
  isRemote: boolean;
  direct: false;
}

export type TargetDescription =
  | RawTargetDescription
  | Qcow2TargetDescription
  | NullTargetDescription
  | NbdTargetDescription
  | StdoutTargetDescription
  | RbdTargetDescription
  | RepositoryTargetDescription;
