// `create`: a new, empty image, as qemu-img create makes it: an existing file is replaced. It is locked first, so
// that an image in use is refused, and nothing is touched before every option is known to be good.
import {
  closeSync,
  constants,
  fstatSync,
  fsyncSync,
  ftruncateSync,
  openSync,
  rmSync,
  statSync,
} from "node:fs";
import { dirname } from "node:path";
import { realPath } from "../../block/file/calls.js";
import { systemName, absoluteName } from "../../file-names.js";
import { ioError } from "../../errors.js";
import type { ImageFormat } from "../../block/format.js";
import { acquireImageLock } from "../../block/file/locks.js";
import { resolveDataFile } from "../../image/external-data.js";
import { SECTOR_BYTES, endOfLastSector } from "../../image/last-sector.js";
import { openImage, resolveBackingPath } from "../../image/open.js";
import { createQcow2, createRaw, planQcow2 } from "../../image/qcow2/create/create.js";
import { refuseDeviceFolder } from "../../target/file/destination.js";
import { parseSize, roundUp } from "../../units.js";
import { printJsonDocument, printLine, type CommandContext } from "../output/context.js";
import { parseFormatOptions, type FormatOptions } from "../options/create-options.js";
import { EXIT } from "../output/exit-codes.js";
import { targetFormatOf } from "../options/target-format.js";
import { refuseExport, unsupported, usageError } from "../options/options.js";

export interface CreateFlags {
  format?: ImageFormat;
  backingFile?: string;
  backingFormat?: ImageFormat;
  options?: string;
}

interface NewImage extends FormatOptions {
  path: string;
  format: ImageFormat;
  sizeBytes: number;
}

export async function runCreate(
  path: string,
  sizeText: string | undefined,
  flags: CreateFlags,
  { output }: CommandContext,
): Promise<number> {
  await refuseNewDevice(path);
  const image = await plan(path, sizeText, flags);
  write(image);
  if (output.json) printJsonDocument(output, createDocument(image));
  else if (!output.quiet) printLine(output, formattingLine(image));
  return EXIT.done;
}

async function refuseNewDevice(path: string): Promise<void> {
  if (statSync(systemName(path), { throwIfNoEntry: false }) !== undefined) return;
  // Where there is no such folder, to create the file says so.
  const folder = await realPath(dirname(absoluteName(path))).catch(() => undefined);
  if (folder !== undefined) await refuseDeviceFolder(path, folder);
}

async function plan(path: string, sizeText: string | undefined, flags: CreateFlags): Promise<NewImage> {
  const format = targetFormatOf(path, flags.format, "-f") ?? "raw";
  const options = parseFormatOptions(flags.options, format);
  const backingFile = flags.backingFile ?? options.backingFile;
  const backingFormat = flags.backingFormat ?? options.backingFormat;
  checkBacking(format, backingFile, backingFormat);
  const given = sizeText === undefined ? options.sizeBytes : parseSize(sizeText, "SIZE");
  // The backing file must open even where its size is not needed, as for qemu-img.
  const inherited =
    backingFile === undefined ? undefined : await backingSize(path, backingFile, backingFormat);
  const sizeBytes = given ?? inherited;
  if (sizeBytes === undefined) throw usageError("SIZE", "is missing", "give a size, such as 20G");
  return { ...options, path, format, sizeBytes, ...(backingFile && { backingFile, backingFormat }) };
}

function checkBacking(
  format: ImageFormat,
  backingFile: string | undefined,
  backingFormat: ImageFormat | undefined,
): void {
  if (backingFile === undefined) {
    if (backingFormat !== undefined) throw usageError("--backing-format", "needs --backing-file");
    return;
  }
  refuseExport(backingFile);
  if (format === "raw") {
    throw usageError("--backing-file", "a raw image has no backing file", "choose qcow2 with -f qcow2");
  }
  if (backingFormat === undefined) {
    throw usageError("--backing-format", "is missing", "name the backing file's format: raw or qcow2");
  }
}

async function backingSize(
  path: string,
  backingFile: string,
  format: ImageFormat | undefined,
): Promise<number> {
  const backing = await openImage(resolveBackingPath(path, backingFile, format), { format, readOnly: true });
  await backing.close();
  return endOfLastSector(backing);
}

function write(image: NewImage): void {
  const { path, format, dataFile } = image;
  if (format === "qcow2") planQcow2(path, image);
  const dataPath = dataFile === undefined ? undefined : resolveDataFile(path, dataFile);
  const isNewDataFile = dataPath !== undefined && writeDataFile(image, dataPath);
  try {
    writeFile(path, (fd) => {
      if (format === "qcow2") createQcow2(fd, path, image);
      else writeRaw(fd, path, image);
    });
  } catch (error) {
    if (isNewDataFile) rmSync(systemName(dataPath), { force: true });
    throw error;
  }
}

/** It is made anew, as qemu-img does it, and as long as the disk, so that it is one by itself. @returns whether it is new */
function writeDataFile(image: NewImage, path: string): boolean {
  return writeFile(
    path,
    (fd) => {
      writeRaw(fd, path, image);
    },
    image.path,
  );
}

function writeRaw(fd: number, path: string, { sizeBytes, preallocation }: NewImage): void {
  createRaw(fd, path, roundUp(sizeBytes, SECTOR_BYTES), preallocation);
}

/**
 * Opens, locks and empties a file, and syncs what `fill` writes. Where that fails a new file is removed, and another
 * one is left empty.
 * @returns whether it is new
 */
function writeFile(path: string, fill: (fd: number) => void, imagePath?: string): boolean {
  const { fd, isNew } = openForCreation(path);
  let isEmptied = false;
  try {
    if (imagePath !== undefined && isSameFile(fd, imagePath)) {
      throw usageError("-o data_file", "is the image itself");
    }
    acquireImageLock(fd, path, { write: true, resize: true });
    truncate(fd, path);
    isEmptied = true;
    fill(fd);
    sync(fd, path);
    return isNew;
  } catch (error) {
    if (isNew) rmSync(systemName(path), { force: true });
    else if (isEmptied) giveBackSpace(fd);
    throw error;
  } finally {
    closeSync(fd);
  }
}

/** What an existing file held is lost already; what is half written must not fill the file system. */
function giveBackSpace(fd: number): void {
  try {
    ftruncateSync(fd, 0);
  } catch {
    // The first cause is what is told.
  }
}

function isSameFile(fd: number, path: string): boolean {
  const other = statSync(systemName(path), { throwIfNoEntry: false });
  const { dev, ino } = fstatSync(fd);
  return other !== undefined && other.dev === dev && other.ino === ino;
}

function openForCreation(path: string): { fd: number; isNew: boolean } {
  const isNew = statSync(systemName(path), { throwIfNoEntry: false }) === undefined;
  try {
    const fd = openSync(systemName(path), constants.O_RDWR | constants.O_CREAT | constants.O_NONBLOCK, 0o644);
    if (fstatSync(fd).isFile()) return { fd, isNew };
    closeSync(fd);
  } catch (cause) {
    throw ioError("create", path, cause);
  }
  throw unsupported(path, "is not a regular file", "images are created in regular files alone");
}

function truncate(fd: number, path: string): void {
  try {
    ftruncateSync(fd, 0);
  } catch (cause) {
    throw ioError("empty", path, cause);
  }
}

function sync(fd: number, path: string): void {
  try {
    fsyncSync(fd);
  } catch (cause) {
    throw ioError("flush", path, cause);
  }
}

/** qemu-img's line: the options in the order in which QEMU lists them. */
export function formattingLine(image: NewImage): string {
  const { path, format, sizeBytes, preallocation, backingFile, dataFile } = image;
  const isQcow2 = format === "qcow2";
  const parts: (string | false | undefined)[] = [
    `Formatting '${path}', fmt=${format}`,
    isQcow2 && `cluster_size=${image.clusterSizeBytes} extended_l2=${onOff(image.extendedL2)}`,
    isQcow2 && preallocation && `preallocation=${preallocation}`,
    isQcow2 && `compression_type=${image.compressionType}`,
    `size=${sizeBytes}`,
    !isQcow2 && preallocation && `preallocation=${preallocation}`,
    image.compat && `compat=${image.compat}`,
    backingFile !== undefined && `backing_file=${backingFile} backing_fmt=${image.backingFormat}`,
    dataFile !== undefined && `data_file=${dataFile}`,
    image.dataFileRaw && "data_file_raw=on",
    isQcow2 && `lazy_refcounts=${onOff(image.lazyRefcounts)} refcount_bits=${image.refcountBits}`,
  ];
  return parts.filter(Boolean).join(" ");
}

function onOff(value: boolean): string {
  return value ? "on" : "off";
}

/** What was made, in the words of `info`. */
export function createDocument(image: NewImage): object {
  return {
    filename: image.path,
    format: image.format,
    "virtual-size": roundUp(image.sizeBytes, SECTOR_BYTES),
    ...(image.format === "qcow2" && { "cluster-size": image.clusterSizeBytes }),
    ...(image.backingFile !== undefined && {
      "backing-filename": image.backingFile,
      "backing-filename-format": image.backingFormat,
    }),
  };
}
