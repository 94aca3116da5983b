// The block device interface: what raw, qcow2, NBD and their decorators (throttle, fault, trace) have in common.
//
// Two kinds of reader and writer exist, because two kinds of thread do:
//  - a BlockDevice belongs to the main thread. It owns its file, its caches and, for a guest's disk, its metadata.
//  - a SourceReader belongs to a worker. It is made from a SourceDescription, which is plain data that crosses
//    the thread boundary once, at T0; from then on the two share nothing but the file and SharedArrayBuffers.
//
// Completion. Data in the page cache is read in 2 to 6 µs; a promise and a turn of the event loop cost more than
// that. So each operation says at once whether it is done: `undefined` means done, a promise means that it goes on.
// Callers on the hot path test for `undefined` and never `await` what has already happened.

import type { ImageFormat } from "./format.js";

/** `undefined`: the operation is complete. A promise: it goes on, and rejects with a CowcatcherError. */
export type Completion = Promise<void> | undefined;

export interface BlockStatus {
  /** Bytes from the queried offset on that share this status; at least 1, never past the queried range. */
  lengthBytes: number;
  /** The range reads as zeroes, as far as metadata or the file system knows. */
  zero: boolean;
  /** Data is stored (as in `qemu-img map`'s "data"). */
  data: boolean;
  /** Depth in the backing chain of the layer that provides the range; 0 is the image itself. */
  depth: number;
  /** Some layer allocates the range (as in `qemu-img map`'s "present"). */
  present: boolean;
  compressed: boolean;
  /** Where the data stands in the providing file, where that is a plain stretch of it. */
  hostOffsetBytes?: number | undefined;
}

/** Bytes of a file from offsetBytes on. */
export interface FileRange {
  readonly fd: number;
  readonly offsetBytes: number;
}

export interface WriteZeroesOptions {
  /** The storage may be released (NBD: NBD_CMD_FLAG_NO_HOLE is not set; QEMU: BDRV_REQ_MAY_UNMAP). */
  mayUnmap: boolean;
}

/**
 * Main thread only. Offsets and lengths are in bytes and lie within [0, sizeBytes): the caller has checked them.
 * Any alignment is allowed. Operations may overlap in time; overlapping writes end in either order, torn at no
 * less than their common bytes (NBD promises no more).
 */
export interface BlockDevice {
  /** What errors call it: the path or URI that the user gave. */
  readonly name: string;
  readonly sizeBytes: number;
  readonly readOnly: boolean;
  /** Unit in which the format allocates, in bytes; 0 where it has none (raw). */
  readonly clusterSizeBytes: number;

  /** Fills buffer[bufferOffset, +lengthBytes) from the device at offsetBytes. */
  read(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion;
  /**
   * Where the range stands in a file as it is, all of it in the page cache now, to be sent from there by reference. What is
   * written there later may show in what was sent before and not read yet: so it is for the disk as it is, where the two
   * are one read and one write at the same time, and never for a view of T0. Undefined: it is to be read.
   */
  cachedRange?(offsetBytes: number, lengthBytes: number): FileRange | undefined;
  /** Writes buffer[bufferOffset, +lengthBytes). The buffer must stay unchanged until completion. */
  write(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion;
  writeZeroes(offsetBytes: number, lengthBytes: number, options: WriteZeroesOptions): Completion;
  /**
   * Whether `writeZeroes` of the range would take less than writing data there: by metadata or by the file system
   * (NBD: NBD_CMD_FLAG_FAST_ZERO). False where it is not known, as without this method. Changes nothing.
   */
  canZeroFast?(offsetBytes: number, lengthBytes: number, options: WriteZeroesOptions): boolean;
  /** Advice that the content is not needed; what the range reads as afterwards is zeroes or the old data. */
  discard(offsetBytes: number, lengthBytes: number): Completion;
  /** On completion every write that had completed before the call is on stable storage, with its metadata. */
  flush(): Completion;
  /** Status of the longest run from offsetBytes on, at most lengthBytes. */
  blockStatus(offsetBytes: number, lengthBytes: number): BlockStatus | Promise<BlockStatus>;
  /** Flushes, releases locks, closes files (backing files too). The device must be idle. */
  close(): Promise<void>;
}

/** A file that an image has open: its path as it was given or stands in a header, and its descriptor. */
export interface ImageFile {
  readonly name: string;
  readonly fd: number;
}

/** An opened image: a device that knows its format and can hand its T0 view to workers. */
export interface Image extends BlockDevice {
  readonly path: string;
  readonly format: ImageFormat;
  /** True where the format was found by probing, not named by the user (Safety rule in CLI.md). */
  readonly probed: boolean;
  readonly backing: Image | null;
  /** The local files or devices that hold this layer, its own first; not those of `backing`. None for an export. */
  readonly files: readonly ImageFile[];

  /**
   * Describes the image as it is at this moment, for readers in workers. Synchronous, so that T0 is one instant.
   * The caller guarantees that no write is in flight, and that from now on no byte changes before it is captured.
   * Until `release`, the image keeps every place valid that the description refers to (a compressed cluster that
   * is rewritten, for example, is not freed).
   */
  freeze(): FrozenSource;
}

export interface FrozenSource {
  readonly description: SourceDescription;
  release(): void;
  /**
   * Asked when everything has been read: whether the files, those of the backing chain too, are still as long as they
   * were. Without it there is nothing that could become shorter unnoticed.
   * @throws CowcatcherError IO for one that is shorter.
   */
  assertNotCut?(): void;
}

export interface RawSourceDescription {
  format: "raw";
  name: string;
  /** Shared by all threads of the process; the main thread closes it, after the workers are gone. */
  fd: number;
  sizeBytes: number;
  direct: boolean;
}

export interface Qcow2SourceDescription {
  format: "qcow2";
  name: string;
  fd: number;
  /** File that holds guest clusters: `fd` itself unless the image has an external data file. */
  dataFd: number;
  /** What errors call that file. */
  dataName: string;
  /** Where the two files end: what is missing before that is an error, what is wanted past it was never written. */
  endOffset: number;
  dataEndOffset: number;
  sizeBytes: number;
  direct: boolean;
  /** Version 2 knows no zero flag: an entry that has it is damaged. */
  version: 2 | 3;
  clusterBits: number;
  isExtendedL2: boolean;
  compressionType: "zlib" | "zstd";
  /** The L1 table of T0: 64-bit entries in host byte order, two 32-bit words each, low word first. */
  l1Table: SharedArrayBuffer;
  /**
   * L2 tables that the main thread had changed in memory but not yet written at T0, as they were at T0, in
   * the image's own big-endian form, one after another; `dirtyL2Index[i]` is the L1 index of the i-th.
   */
  dirtyL2Tables: SharedArrayBuffer;
  dirtyL2Index: number[];
  backing: SourceDescription | null;
}

export interface NullSourceDescription {
  /** Reads as zeroes: what lies beyond the end of a short backing file. */
  format: "null";
  name: string;
  sizeBytes: number;
}

export interface NbdSourceDescription {
  format: "nbd";
  name: string;
  /** Each worker makes a connection of its own to it. */
  uri: string;
  sizeBytes: number;
  /** How often a lost connection is made again before a read fails. */
  retries: number;
  /** What reads as zeroes, where that was asked for and cannot change any more (block/extent-map.ts). */
  zeroes: { runs: SharedArrayBuffer; runCount: number } | null;
  /**
   * The export is a snapshot that costs its server something for as long as it is kept: what was read is discarded
   * there, and connections stay open until the thread ends. (QEMU: a snapshot-access node, src/qemu/filter.ts.)
   */
  isSnapshot?: boolean | undefined;
  /** Connections stay open until the thread ends: whoever has the export takes it away first. As with isSnapshot. */
  staysOpen?: boolean | undefined;
  /** Read in the server's place (nbd/client/live-file.ts). */
  live?: LiveFileDescription | undefined;
  /** Of a snapshot: from here on nothing is discarded. Undefined: all is. */
  keptFromBytes?: number | undefined;
}

/** A disk's file that its server goes on writing to. Descriptors of this process. */
export interface LiveFileDescription {
  fd: number;
  /** Has T0's data of what was overwritten, and holes elsewhere; null: the job's own captures have it. */
  oldDataFd: number | null;
  /** Flagged: where the file may be read at all. Undefined: everywhere. */
  written?: { runs: SharedArrayBuffer; runCount: number } | undefined;
}

/** An open RBD image, for every thread of this process (rbd/io.ts). */
export interface RbdHandle {
  /** librbd's pointer. */
  image: bigint;
  /** Who uses it, and until when: rbd/door.ts. */
  door: SharedArrayBuffer;
  /** What errors call it. */
  name: string;
}

export interface RbdSourceDescription {
  format: "rbd";
  name: string;
  handle: RbdHandle;
  sizeBytes: number;
  /** What reads as zeroes, where that was asked for (block/extent-map.ts). */
  zeroes: { runs: SharedArrayBuffer; runCount: number } | null;
}

/** A disk of a backup (src/repository/read). */
export interface RepositorySourceDescription {
  format: "repository";
  name: string;
  sizeBytes: number;
  chunkBytes: number;
  /** 32 bytes a chunk: its id, or zeroes for a hole. */
  ids: SharedArrayBuffer;
  /** Which of them are patches (src/repository/format/patch-table.ts). */
  patches: SharedArrayBuffer;
  /** Where the chunks are, and the keys to them: plain data that the repository's room makes and reads. */
  store: unknown;
  secrets: unknown;
  /** Answers take their time whatever the processor does. */
  isRemote: boolean;
}

export type SourceDescription =
  | RawSourceDescription
  | Qcow2SourceDescription
  | NullSourceDescription
  | NbdSourceDescription
  | RbdSourceDescription
  | RepositorySourceDescription;

/** A worker's view of the source at T0. One thread; offsets and lengths within [0, sizeBytes). */
export interface SourceReader {
  readonly sizeBytes: number;
  read(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion;
  /**
   * Bytes from offsetBytes on, at most lengthBytes, that are all zero by metadata (zero: true) or may hold data
   * (zero: false). For a huge empty range it must answer in one step as far as its tables or the file system
   * tell: the sweep over a sparse 16 TiB image depends on it.
   */
  extent(offsetBytes: number, lengthBytes: number): { lengthBytes: number; zero: boolean };
  /**
   * Bytes from offsetBytes on, at most lengthBytes, that the image's own layer allocates (true) or that show what
   * lies below it (false; QEMU: bdrv_is_allocated). As fast as `extent`. Without it the image has one layer.
   */
  allocation?(offsetBytes: number, lengthBytes: number): { lengthBytes: number; allocated: boolean };
  /**
   * The range has been read and is not asked for again: whoever keeps its T0 content for this reader need not any
   * more. Advice: a failure costs space and nothing else, so none is told. Without it there is nothing to let go.
   */
  release?(offsetBytes: number, lengthBytes: number): Completion;
  close(): void;
}
