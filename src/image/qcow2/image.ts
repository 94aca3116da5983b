// A qcow2 image as a block device.
//
// Parts and who owns what (all on the main thread):
//   header.ts       bytes of the header                     entry.ts        bits of L2 entries
//   file.ts         the file (direct-file.ts: O_DIRECT)     mapping.ts      L1, L2 cache, what a change needs
//   refcounts.ts    refcounts, allocation                   frees.ts        host space on its way to being free
//   host-space.ts   where host clusters come from           data-file.ts    an external data file
//   guest/read.ts, guest/write.ts, guest/zero.ts            what the guest asks for
//   flusher.ts      the order in which metadata reaches the file
//   reader.ts       a worker's view of T0                   left-bitmap.ts  for a QEMU that writes the image later
//
// Invariants:
//  1. The file's refcounts are never lower than the references that its tables hold (a crash leaks, no more).
//  2. An L2 entry, in memory or in the file, points to data that is written.
//  3. A host cluster is reused only after no table in the file, no operation in flight and no frozen T0 needs it.
//  4. While a freeze lasts, the file holds T0's L2 tables unchanged where T0's L1 table says (but those that were
//     handed over in memory).

import { CowcatcherError, toCowcatcherError } from "../../errors.js";
import type {
  BlockStatus,
  Completion,
  FrozenSource,
  Image,
  ImageFile,
  Qcow2SourceDescription,
  WriteZeroesOptions,
} from "../../block/device.js";
import { readBitmapDirectory, readDirtyBitmap, type DirtyBitmap } from "./format/bitmap.js";
import { type HostRange, leaveBitmap, rangesOfBitmaps, readLeftBitmap } from "./left-bitmap.js";
import { BlockStatusQuery } from "./guest/block-status.js";
import { DataFile } from "./guest/data-file.js";
import { Decompressor } from "./format/decompress.js";
import { DirectQcowFile } from "./format/direct-file.js";
import { EntryTable } from "./format/entry-table.js";
import { BufferedFile, type QcowFile } from "./format/file.js";
import { Flusher } from "./guest/flusher.js";
import { GuestReader } from "./guest/read.js";
import { GuestWriter } from "./guest/write.js";
import { GuestZeroer, ZeroMode } from "./guest/zero.js";
import {
  AUTOCLEAR_BITMAPS,
  AUTOCLEAR_RAW_EXTERNAL_DATA,
  FIELD_OFFSET,
  INCOMPATIBLE_CORRUPT,
  INCOMPATIBLE_DIRTY,
  assertSupported,
  hasExternalDataFile,
  isDataFileRaw,
  readHeader,
  type Qcow2Header,
} from "./format/header.js";
import { assertStored } from "./format/stored.js";
import { describeImage, type Qcow2ImageInfo } from "./info.js";
import { Mapping, type FrozenTables } from "./guest/mapping.js";
import { headerOfSnapshot, readSnapshotTable, type ReadRange } from "./format/snapshots.js";

export interface OpenQcow2Options {
  path: string;
  /** What errors call the image. */
  name: string;
  /** Opened by the caller; the image closes it. On failure to open it stays the caller's. */
  fd: number;
  readOnly: boolean;
  /** The fd was opened with O_DIRECT. */
  direct: boolean;
  probed: boolean;
  backing: Image | null;
  /** Id or name of an internal snapshot: the disk as of it. With `readOnly` alone. */
  snapshot?: string | undefined;
  /** The external data file, for an image whose header says that it has one; opened and closed as `fd` is. */
  dataFd?: number | undefined;
  /** What errors call it. */
  dataName?: string | undefined;
  /** The caller says when writes may come (beginWriting): until then the bitmaps are good. */
  defersWriting?: boolean | undefined;
  /** In place of the fds' files: for tests. */
  file?: QcowFile | undefined;
  dataFile?: QcowFile | undefined;
}

/**
 * Opens an image on a file that the caller has opened and locked.
 * @throws CowcatcherError FORMAT, UNSUPPORTED, LIMIT or IO.
 */
export async function openQcow2(options: OpenQcow2Options): Promise<Qcow2Image> {
  const { fd, name, direct, readOnly } = options;
  const file = options.file ?? fileOn(fd, name, direct);
  const header = readHeader((buffer, offsetBytes) => {
    const count = Math.min(buffer.length, Math.max(0, file.endOffset - offsetBytes));
    file.readSync(buffer, 0, count, offsetBytes);
    return count;
  }, name);
  assertSupported(header, name);
  const dataFile = hasExternalDataFile(header) ? openDataFile(options, isDataFileRaw(header)) : null;
  const { snapshot } = options;
  if (snapshot !== undefined) {
    const asOfThen = headerOfSnapshot(header, rangeReader(file), snapshot, name);
    return new Qcow2Image(options, asOfThen, file, dataFile, null);
  }
  if (readOnly) return new Qcow2Image(options, header, file, dataFile, null);
  assertWritable(header, name);
  const { bitmaps } = header;
  const hadBitmaps = bitmaps !== null && (header.autoclearFeatures & AUTOCLEAR_BITMAPS) !== 0n;
  const written = { staleBitmaps: hadBitmaps ? namesOfBitmaps(header, file) : [], hadBitmaps };
  const image = new Qcow2Image(options, header, file, dataFile, written);
  if (options.defersWriting !== true) await image.beginWriting();
  return image;
}

/** As far as the directory can be read: it is about to be of no use to anybody. */
function namesOfBitmaps(header: Qcow2Header, file: QcowFile): string[] {
  try {
    return readBitmapDirectory(header, file).map(({ name }) => name);
  } catch {
    return [];
  }
}

function fileOn(fd: number, name: string, direct: boolean): QcowFile {
  return direct ? new DirectQcowFile(fd, name) : new BufferedFile(fd, name);
}

function openDataFile(options: OpenQcow2Options, isRaw: boolean): DataFile {
  const { dataFile, dataFd, dataName, name, direct } = options;
  if (dataFile !== undefined) return new DataFile(dataFile, isRaw);
  if (dataFd !== undefined) return new DataFile(fileOn(dataFd, dataName ?? name, direct), isRaw);
  throw new CowcatcherError({
    code: "FORMAT",
    object: name,
    problem: "the image keeps its data in an external data file, and does not name it",
    hint: "name it with qemu-img amend -o data_file=NAME",
  });
}

function rangeReader(file: QcowFile): ReadRange {
  return (offsetBytes, lengthBytes) => {
    const bytes = new Uint8Array(lengthBytes);
    assertStored(file, "the snapshot table", offsetBytes, lengthBytes);
    file.readSync(bytes, 0, lengthBytes, offsetBytes);
    return new DataView(bytes.buffer);
  };
}

function assertWritable(header: Qcow2Header, name: string): void {
  assertDataFileWritable(header, name);
  const isCorrupt = (header.incompatibleFeatures & INCOMPATIBLE_CORRUPT) !== 0n;
  const isDirty = (header.incompatibleFeatures & INCOMPATIBLE_DIRTY) !== 0n;
  if (!isCorrupt && !isDirty) return;
  throw new CowcatcherError({
    code: "FORMAT",
    object: name,
    problem: isCorrupt
      ? "the image is marked corrupt, so it can only be opened read-only"
      : "the image was not closed cleanly and its refcounts may be wrong, so it can only be opened read-only",
    hint: "repair it with cowcatcher check --repair, or qemu-img check -r all",
  });
}

/** What reads well enough, but cannot be written and stay what it is. */
function assertDataFileWritable(header: Qcow2Header, name: string): void {
  if (!hasExternalDataFile(header)) return;
  const hasSnapshots = header.snapshotCount > 0;
  if (!hasSnapshots && (header.backingFile === null || !isDataFileRaw(header))) return;
  throw new CowcatcherError({
    code: "UNSUPPORTED",
    object: name,
    problem: hasSnapshots
      ? "it has internal snapshots and an external data file, which the format does not allow"
      : "it has a backing file and a raw external data file, which the format does not allow",
    hint: "open it read-only, and copy it with qemu-img convert",
  });
}

/**
 * Features that a writer which does not maintain them must clear first: bitmaps, and all that are unknown. The bit of
 * a raw data file is maintained. It is durable before any write.
 */
async function clearAutoclear(header: Qcow2Header, file: QcowFile): Promise<void> {
  const kept = isDataFileRaw(header) ? AUTOCLEAR_RAW_EXTERNAL_DATA : 0n;
  const features = header.autoclearFeatures & kept;
  if (header.autoclearFeatures === features) return;
  header.autoclearFeatures = features;
  const field = new Uint8Array(8);
  new DataView(field.buffer).setBigUint64(0, features);
  await file.write(field, 0, field.length, FIELD_OFFSET.autoclearFeatures);
  await file.sync();
}

/**
 * An open qcow2 image: guest reads, writes, zeroes, discards and flushes, in bytes. Main thread only.
 * Follows docs/interop/qcow2.rst of qemu/qemu.
 */
export class Qcow2Image implements Image {
  readonly format = "qcow2";
  readonly path: string;
  readonly name: string;
  readonly readOnly: boolean;
  readonly probed: boolean;
  readonly backing: Image | null;
  readonly sizeBytes: number;
  readonly clusterSizeBytes: number;

  private readonly direct: boolean;
  private readonly mapping: Mapping;
  private readonly decompressor: Decompressor;
  private readonly reader: GuestReader;
  private readonly writer: GuestWriter;
  private readonly zeroer: GuestZeroer;
  private readonly flusher: Flusher;
  private readonly status: BlockStatusQuery;

  /** Bitmaps that were good until this image was opened for writing: who writes here does not keep them. */
  readonly staleBitmaps: readonly string[];
  /** Clusters of bitmaps that were good until writing began. */
  private oldBitmaps: readonly HostRange[] = [];
  /** Writing has begun. */
  private isWritable = false;

  /** Use openQcow2. @param written what was found before the image was made ready to be written; null if it is not */
  constructor(
    options: OpenQcow2Options,
    readonly header: Qcow2Header,
    private readonly file: QcowFile,
    private readonly externalData: DataFile | null,
    written: { staleBitmaps: readonly string[]; hadBitmaps: boolean } | null,
  ) {
    this.staleBitmaps = written?.staleBitmaps ?? [];
    this.path = options.path;
    this.name = options.name;
    this.readOnly = options.readOnly;
    this.probed = options.probed;
    this.backing = options.backing;
    this.direct = options.direct;
    this.sizeBytes = header.sizeBytes;
    this.clusterSizeBytes = 2 ** header.clusterBits;
    const { backing, name, sizeBytes } = this;
    const dataFile = externalData?.file ?? file;
    this.mapping = new Mapping(header, file, dataFile);
    if (written !== null) {
      const snapshots = readSnapshotTable(header, rangeReader(file), name);
      this.mapping.guardMetadata(header, snapshots, written.hadBitmaps);
    }
    this.status = new BlockStatusQuery(header, file, dataFile, this.mapping, backing);
    this.decompressor = new Decompressor(header.compressionType, name);
    this.reader = new GuestReader(this.mapping, file, dataFile, backing, this.decompressor);
    this.flusher = new Flusher(this.mapping, file, () => this.reader.forget(), dataFile);
    this.mapping.relieve = (mustWait) => this.flusher.relieve(mustWait);
    this.writer = new GuestWriter(this.mapping, dataFile, backing, this.reader, this.flusher, sizeBytes);
    this.zeroer = new GuestZeroer(
      this.mapping,
      backing,
      this.writer,
      header.version,
      sizeBytes,
      name,
      externalData,
    );
  }

  /** The file that holds the guest's clusters, as errors and `map` call it. */
  get dataName(): string {
    return this.externalData?.file.name ?? this.path;
  }

  get files(): readonly ImageFile[] {
    const data = this.externalData?.file;
    return data === undefined ? [this.file] : [this.file, data];
  }

  read(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    return this.reader.read(buffer, bufferOffset, lengthBytes, offsetBytes);
  }

  write(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    if (this.readOnly) return Promise.reject(this.readOnlyError());
    return this.writer.write(buffer, bufferOffset, lengthBytes, offsetBytes);
  }

  writeZeroes(offsetBytes: number, lengthBytes: number, { mayUnmap }: WriteZeroesOptions): Completion {
    if (this.readOnly) return Promise.reject(this.readOnlyError());
    return this.zeroer.zero(offsetBytes, lengthBytes, mayUnmap ? ZeroMode.Unmap : ZeroMode.Keep);
  }

  /** Whole clusters are zeroed by metadata; version 2 cannot where a backing file would show through. */
  canZeroFast(offsetBytes: number, lengthBytes: number): boolean {
    const end = offsetBytes + lengthBytes;
    const isWhole =
      offsetBytes % this.clusterSizeBytes === 0 &&
      (end % this.clusterSizeBytes === 0 || end === this.sizeBytes);
    const isByMetadata = this.header.version >= 3 || this.backing === null;
    return isWhole && isByMetadata && this.externalData?.isRaw !== true && !this.readOnly;
  }

  discard(offsetBytes: number, lengthBytes: number): Completion {
    if (this.readOnly) return Promise.reject(this.readOnlyError());
    return this.zeroer.zero(offsetBytes, lengthBytes, ZeroMode.Discard);
  }

  flush(): Completion {
    return this.readOnly ? undefined : this.flusher.flush();
  }

  blockStatus(offsetBytes: number, lengthBytes: number): BlockStatus | Promise<BlockStatus> {
    try {
      return this.status.statusAt(offsetBytes, lengthBytes);
    } catch (error) {
      return Promise.reject(toCowcatcherError(error, this.name));
    }
  }

  /** What `qemu-img info --output=json` shows of the format. @throws CowcatcherError */
  imageInfo(): Qcow2ImageInfo {
    return describeImage(this.header, this.file);
  }

  /**
   * Before the first write to an image that was opened with `defersWriting`: its bitmaps are out of date from now on.
   * @throws CowcatcherError IO
   */
  async beginWriting(): Promise<void> {
    if (this.readOnly || this.isWritable) return;
    const { header, file } = this;
    if ((header.autoclearFeatures & AUTOCLEAR_BITMAPS) !== 0n)
      this.oldBitmaps = rangesOfBitmaps(header, file);
    await clearAutoclear(header, file);
    this.isWritable = true;
  }

  /**
   * What others have written to the image since `leaveBitmap` left the bitmap in it; asked before writing begins.
   * @param sizeThen of the disk, in bytes
   * @returns undefined where nobody can say. @throws CowcatcherError IO
   */
  writesSince(bitmap: string, sizeThen: number): DirtyBitmap | undefined {
    return readLeftBitmap(this.header, this.file, bitmap, sizeThen);
  }

  /**
   * The last thing before the image is closed: flushes it, and leaves a bitmap in it to which a QEMU writes its changes
   * (left-bitmap.ts). No write may come any more.
   * @returns false where the image cannot have one. @throws CowcatcherError IO, NO_SPACE: there is none then.
   */
  async leaveBitmap(name: string): Promise<boolean> {
    if (!this.isWritable) return false;
    const { header, file, mapping } = this;
    const flush = (): Promise<void> => this.flushAll();
    await flush();
    if (!(await leaveBitmap(header, file, mapping.refcounts, flush, name))) return false;
    await this.freeOldBitmaps();
    return true;
  }

  /**
   * The bitmaps that went out of date when writing began give their clusters back; else these are leaks, as after every
   * program that knows no bitmaps. The last thing before the image is closed. @throws CowcatcherError IO
   */
  async freeOldBitmaps(): Promise<void> {
    if (!this.isWritable) return;
    for (const { offsetBytes, lengthBytes } of this.oldBitmaps) {
      this.mapping.refcounts.dropRegion(offsetBytes, lengthBytes);
    }
    this.oldBitmaps = [];
    await this.flushAll();
  }

  bitmapNames(): string[] {
    return readBitmapDirectory(this.header, this.file).map(({ name }) => name);
  }

  /** @throws CowcatcherError where there is none of this name, or its bits cannot be relied on (bitmap.ts). */
  readBitmap(name: string): DirtyBitmap {
    return readDirtyBitmap(this.header, this.file, name);
  }

  freeze(): FrozenSource {
    this.assertNotCut();
    const backing = this.backing?.freeze() ?? null;
    const { mapping, clusterSizeBytes } = this;
    const l1Table = new SharedArrayBuffer(mapping.l1.lengthBytes);
    const l1Words = new Uint32Array(l1Table);
    l1Words.set(mapping.l1.words);
    const tables = mapping.l2.pinnedTables();
    const dirtyL2Tables = new SharedArrayBuffer(tables.length * clusterSizeBytes);
    const dirtyBytes = new Uint8Array(dirtyL2Tables);
    tables.forEach(({ bytes }, position) => dirtyBytes.set(bytes, position * clusterSizeBytes));
    const dirtyL2Index = tables.map(({ index }) => index);
    const frozen: FrozenTables = {
      l1: new EntryTable(l1Words, mapping.l1.offsetBytes),
      handedOver: new Set(dirtyL2Index),
    };
    mapping.frozen.add(frozen);
    mapping.frees.freeze();
    this.watchFiles(true);
    const description: Qcow2SourceDescription = {
      format: "qcow2",
      name: this.name,
      fd: this.file.fd,
      dataFd: this.externalData?.file.fd ?? this.file.fd,
      dataName: this.dataName,
      endOffset: this.file.endOffset,
      dataEndOffset: (this.externalData?.file ?? this.file).endOffset,
      sizeBytes: this.sizeBytes,
      direct: this.direct,
      version: this.header.version,
      clusterBits: this.header.clusterBits,
      isExtendedL2: this.mapping.hasSubclusters,
      compressionType: this.header.compressionType,
      l1Table,
      dirtyL2Tables,
      dirtyL2Index,
      backing: backing?.description ?? null,
    };
    const release = (): void => {
      if (!mapping.frozen.delete(frozen)) return;
      mapping.frees.release();
      this.watchFiles(mapping.frees.isFrozen);
      backing?.release();
    };
    const assertNotCut = (): void => {
      this.assertNotCut();
      backing?.assertNotCut?.();
    };
    return { description, release, assertNotCut };
  }

  private watchFiles(isWatched: boolean): void {
    this.file.isWatched = isWatched;
    if (this.externalData !== null) this.externalData.file.isWatched = isWatched;
  }

  private assertNotCut(): void {
    this.file.assertNotCut?.();
    this.externalData?.file.assertNotCut?.();
  }

  async close(): Promise<void> {
    let failure: unknown;
    try {
      if (!this.readOnly) await this.flushAll();
    } catch (error) {
      failure = error;
    }
    this.decompressor.close();
    await this.externalData?.file.close();
    await this.file.close();
    await this.backing?.close();
    if (failure !== undefined) throw toCowcatcherError(failure, this.name);
  }

  /** Until nothing is left to write: settled frees change refcounts after the flush that settled them. */
  private async flushAll(): Promise<void> {
    const { flusher, mapping } = this;
    while (flusher.isDirty || mapping.applyFrees()) {
      await flusher.flush();
      await mapping.unmapper.idle();
    }
  }

  private readOnlyError(): CowcatcherError {
    return new CowcatcherError({
      code: "IO",
      object: this.name,
      problem: "the image is read-only",
      errno: "EROFS",
    });
  }
}
