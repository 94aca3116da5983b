// From a path to an opened image with its backing chain: open, lock, probe, construct, in that order.
//
// Locks come before the first byte is read, so that what is probed is what will be used. Backing images are opened
// read-only with readers' locks. Whatever fails, what was opened so far is closed before the error goes on.
// A chain may not come back to a file that it holds already (by device and inode, so that links do not help), and
// its depth is bounded.

import { closeSync, openSync } from "node:fs";
import { CowcatcherError, ioError } from "../errors.js";
import { openNbdImage } from "../nbd/client/device.js";
import { isNbdUri } from "../nbd/wire/uri.js";
import { isRbdAddress } from "../rbd/address.js";
import { openRbdImage } from "../rbd/image.js";
import { resolveBacking } from "./backing-name.js";
import type { Image } from "../block/device.js";
import { type ExternalData, fileIdentity, openExternalData } from "./external-data.js";
import { closeFile, readFirstBytes, readFullySync } from "../block/file/fileio.js";
import type { ImageFormat } from "../block/format.js";
import { acquireImageLock } from "../block/file/locks.js";
import { PROBE_BYTES, probeFormat, probeSignature } from "./probe.js";
import { repairIfDirty } from "./qcow2/check/check.js";
import { assertSupported, type Qcow2Header, readHeader } from "./qcow2/format/header.js";
import { openQcow2 } from "./qcow2/image.js";
import { openImageFile } from "../block/file/image-file.js";
import { openRaw } from "./raw.js";

/** Stated bound of a backing chain; QEMU has none, and chains in use are shorter than 100. */
export const MAX_BACKING_DEPTH = 200;

export interface OpenOptions {
  /** Undefined: probed. */
  format?: ImageFormat | undefined;
  readOnly: boolean;
  /** O_DIRECT, for the backing files too. */
  direct?: boolean | undefined;
  /** QEMU's image locks (locks.ts); true by default. */
  lock?: boolean | undefined;
  /** Open the backing chain; true by default. Without it unallocated clusters read as zeroes. */
  backing?: boolean | undefined;
  /** Id or name of an internal snapshot of a qcow2 image: the disk as of it, read-only. */
  snapshot?: string | undefined;
  /** A qcow2 image's bitmaps stay good until its owner says that writing begins (Qcow2Image.beginWriting). */
  defersWriting?: boolean | undefined;
  /** Of an NBD export only: the dirty bitmap that the copy will ask for. */
  bitmap?: string | undefined;
  /** Opened by this path, while errors and relative names in the image go by the other one (of an open file without a name). */
  openAs?: string | undefined;
  /** Of an NBD export: asked while a server's answer is awaited; true ends the wait with CANCELLED. */
  isCancelled?: (() => boolean) | undefined;
}

/** Options as they hold for the whole chain, and the files that it consists of so far. */
interface ChainState {
  direct: boolean;
  lock: boolean;
  backing: boolean;
  isCancelled: (() => boolean) | undefined;
  /** "device:inode" of each file. */
  files: Set<string>;
}

/**
 * Opens an image and its backing chain. Main thread.
 * @throws CowcatcherError NOT_FOUND, IO, LOCKED, UNSUPPORTED (foreign format, protocol, O_DIRECT), FORMAT, LIMIT.
 */
export async function openImage(imagePath: string, options: OpenOptions): Promise<Image> {
  if (options.snapshot !== undefined && !options.readOnly) throw snapshotIsReadOnly(imagePath);
  if (isNbdUri(imagePath)) return openNbd(imagePath, options);
  if (isRbdAddress(imagePath)) return openRbd(imagePath, options);
  const chain: ChainState = {
    direct: options.direct ?? false,
    lock: options.lock ?? true,
    backing: options.backing ?? true,
    isCancelled: options.isCancelled,
    files: new Set(),
  };
  return openLayer(imagePath, options.format, options.readOnly, chain, options);
}

/** An export is raw: what another program serves as qcow2 bytes, that program can serve as a disk. */
async function openNbd(uri: string, options: OpenOptions): Promise<Image> {
  const { format, readOnly, bitmap, snapshot, isCancelled } = options;
  if (snapshot !== undefined) throw noSnapshots(uri, "an NBD export");
  if (format !== undefined && format !== "raw") {
    throw unsupported(
      uri,
      `an NBD export cannot be read as ${format}`,
      `export the disk and not its file, as with qemu-nbd -f ${format}`,
    );
  }
  return openNbdImage(uri, { readOnly, bitmap, isCancelled });
}

/** An image's bytes are the disk, as those of an export. */
async function openRbd(address: string, options: OpenOptions): Promise<Image> {
  const { format, readOnly, lock, snapshot, isCancelled } = options;
  if (snapshot !== undefined) {
    throw unsupported(address, "a snapshot of an RBD image is named in its address", "give IMAGE@SNAP");
  }
  if (format !== undefined && format !== "raw") {
    throw unsupported(address, `an RBD image is not read as ${format}`, "give -f raw, or leave -f out");
  }
  return openRbdImage(address, { readOnly, lock, isCancelled });
}

async function openLayer(
  imagePath: string,
  format: ImageFormat | undefined,
  readOnly: boolean,
  chain: ChainState,
  {
    snapshot,
    openAs = imagePath,
    defersWriting,
  }: Pick<OpenOptions, "snapshot" | "openAs" | "defersWriting"> = {},
): Promise<Image> {
  const fd = await openImageFile(openAs, { readOnly, direct: chain.direct });
  let backing: Image | null = null;
  let data: ExternalData | undefined;
  try {
    enterChain(imagePath, fileIdentity(fd), chain);
    if (chain.lock) acquireImageLock(fd, imagePath, { write: !readOnly });
    const probed = format === undefined;
    const known = format ?? probeFormat(imagePath, readFirstBytes(imagePath, fd, PROBE_BYTES));
    const base = { path: imagePath, name: imagePath, fd, readOnly, direct: chain.direct, probed };
    if (known === "raw") {
      if (snapshot !== undefined) throw noSnapshots(imagePath, "a raw image");
      return await openRaw(base);
    }
    if (chain.lock && !readOnly) acquireImageLock(fd, imagePath, { write: true, resize: true });
    const header = readHeaderOf(imagePath, fd, chain.direct);
    assertSupported(header, imagePath);
    if (chain.backing) backing = await openBackingOf(imagePath, header, chain);
    data = await openExternalData(imagePath, header, { ...chain, readOnly });
    // Last: an image that cannot be opened is left as it is.
    if (!readOnly) await repairIfDirty(imagePath, fd);
    return await openQcow2({ ...base, ...data, backing, snapshot, defersWriting });
  } catch (error) {
    await backing?.close();
    if (data !== undefined) await closeFile(data.dataFd);
    await closeFile(fd);
    throw ioError("open", imagePath, error);
  }
}

function snapshotIsReadOnly(object: string): CowcatcherError {
  return new CowcatcherError({
    code: "USAGE",
    object,
    problem: "an internal snapshot cannot be written",
    hint: "open it read-only",
  });
}

function noSnapshots(object: string, kind: string): CowcatcherError {
  return new CowcatcherError({
    code: "UNSUPPORTED",
    object,
    problem: `${kind} has no internal snapshots`,
    hint: "leave --snapshot out",
  });
}

function enterChain(imagePath: string, file: string, chain: ChainState): void {
  if (chain.files.has(file)) {
    throw new CowcatcherError({
      code: "FORMAT",
      object: imagePath,
      problem: "the backing chain comes back to this file",
      hint: "correct the backing file name with qemu-img rebase -u",
    });
  }
  if (chain.files.size > MAX_BACKING_DEPTH) {
    throw new CowcatcherError({
      code: "LIMIT",
      object: imagePath,
      problem: `the backing chain is deeper than ${MAX_BACKING_DEPTH}`,
      hint: "shorten it with qemu-img commit or rebase",
    });
  }
  chain.files.add(file);
}

async function openBackingOf(
  overlayPath: string,
  header: Qcow2Header,
  chain: ChainState,
): Promise<Image | null> {
  if (header.backingFile === null || header.backingFile === "") return null;
  const layer = resolveBacking(overlayPath, header.backingFile, header.backingFormat);
  const { format } = layer;
  if (layer.kind === "nbd") return openNbdBacking(overlayPath, layer.uri, format, chain);
  try {
    return await openLayer(layer.path, format, true, chain);
  } catch (error) {
    throw asBackingError(overlayPath, layer.path, error);
  }
}

/** The end of a chain: an export is raw. Where nobody says so it must look like it, as QEMU would probe it. */
async function openNbdBacking(
  overlayPath: string,
  uri: string,
  format: ImageFormat | undefined,
  { isCancelled }: ChainState,
): Promise<Image> {
  let image: Image | undefined;
  try {
    image = await openNbd(uri, { format, readOnly: true, isCancelled });
    if (format === undefined) await assertLooksRaw(image);
    return image;
  } catch (error) {
    await image?.close();
    if (!(error instanceof CowcatcherError) || error.object !== uri) throw error;
    const problem = `its backing file '${uri}': ${error.problem}`;
    throw new CowcatcherError({ ...error.toDetails(), object: overlayPath, problem, cause: error });
  }
}

async function assertLooksRaw(image: Image): Promise<void> {
  const sector = new Uint8Array(Math.min(PROBE_BYTES, image.sizeBytes));
  if (sector.length > 0) await image.read(sector, 0, sector.length, 0);
  const found = probeSignature(sector);
  if (found === "raw") return;
  throw unsupported(
    image.name,
    `the export holds an image in the format '${found}', and the overlay does not name it raw`,
    "export the disk and not its file, or say that it is raw with qemu-img rebase -u -F raw",
  );
}

/** A missing backing file is no news without the image that asks for it. */
function asBackingError(overlayPath: string, backingPath: string, error: unknown): unknown {
  const isMissing =
    error instanceof CowcatcherError && error.code === "NOT_FOUND" && error.object === backingPath;
  if (!isMissing) return error;
  return new CowcatcherError({
    code: "NOT_FOUND",
    object: overlayPath,
    problem: `its backing file '${backingPath}' does not exist`,
    hint: "bring it back, or correct the name with qemu-img rebase -u",
    errno: error.errno,
    cause: error,
  });
}

/**
 * The path of a new image's backing file, which is a local one: `backingFile` is the name that goes into its header.
 * @throws CowcatcherError as resolveBacking; UNSUPPORTED for an NBD export.
 */
export function resolveBackingPath(overlayPath: string, backingFile: string, format?: ImageFormat): string {
  const layer = resolveBacking(overlayPath, backingFile, format ?? null);
  if (layer.kind === "file") return layer.path;
  throw unsupported(
    overlayPath,
    `a new image's backing file must be a local one, and '${layer.uri}' is an NBD export`,
    "such an image is made with qemu-img create, and read here",
  );
}

/** O_DIRECT would want aligned memory for these few bytes, so the file is opened a second time without it. */
function readHeaderOf(imagePath: string, fd: number, direct: boolean): Qcow2Header {
  const bufferedFd = direct ? openSync(`/proc/self/fd/${fd}`, "r") : fd;
  try {
    return readHeader(
      (buffer, offsetBytes) => readFullySync(imagePath, bufferedFd, buffer, 0, buffer.length, offsetBytes),
      imagePath,
    );
  } finally {
    if (direct) closeSync(bufferedFd);
  }
}

function unsupported(object: string, problem: string, hint?: string): CowcatcherError {
  return new CowcatcherError({ code: "UNSUPPORTED", object, problem, hint });
}
