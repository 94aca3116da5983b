// `info`: what an image is, in the words of qemu-img info.
//
// It reads the header alone, so that it also describes images that this version cannot open: encrypted ones, and
// those whose data file is missing.
import { fstatSync, statSync } from "node:fs";
import { dirname, isAbsolute } from "node:path";
import { systemName } from "../../file-names.js";
import { CowcatcherError, ioError } from "../../errors.js";
import { type BackingLayer, hasProtocol, resolveBacking } from "../../image/backing-name.js";
import { sizeOf } from "../../block/file/device-size.js";
import { closeFile, readFirstBytes, readFullySync } from "../../block/file/fileio.js";
import type { ImageFormat } from "../../block/format.js";
import { openImageFile } from "../../block/file/image-file.js";
import { acquireImageLock } from "../../block/file/locks.js";
import { MAX_BACKING_DEPTH, openImage } from "../../image/open.js";
import { PROBE_BYTES, probeFormat } from "../../image/probe.js";
import { BufferedFile } from "../../image/qcow2/format/file.js";
import {
  AUTOCLEAR_RAW_EXTERNAL_DATA,
  CRYPT_LUKS,
  CRYPT_NONE,
  INCOMPATIBLE_EXTERNAL_DATA,
  readHeader,
  type Qcow2Header,
} from "../../image/qcow2/format/header.js";
import { describeImage } from "../../image/qcow2/info.js";
import { RbdImage } from "../../rbd/image.js";
import { isBackupAddress } from "../../repository/address.js";
import { openBackup } from "../../repository/open.js";
import { inspectTracking } from "../../tracking/inspect.js";
import { TRACKING_SUFFIX } from "../../tracking/folder.js";
import { roundUp } from "../../units.js";
import { printJsonDocument, printLine, type CommandContext } from "../output/context.js";
import { type KeyFlags, lazyKey } from "../options/repository-options.js";
import { EXIT } from "../output/exit-codes.js";
import {
  infoLines,
  type FormatSpecificDocument,
  type ImageInfoDocument,
  type TrackingDocument,
} from "../output/info-text.js";
import { isNbdUri, isRbdAddress } from "../options/options.js";

export interface InfoFlags extends KeyFlags {
  format?: ImageFormat;
  forceShare?: boolean;
  backingChain?: boolean;
}

const SECTOR_BYTES = 512;
/** Of st_blocks (stat(2)). */
const STAT_BLOCK_BYTES = 512;

export async function runInfo(path: string, flags: InfoFlags, { output }: CommandContext): Promise<number> {
  if (isBackupAddress(path)) return runBackupInfo(path, flags, output);
  const lock = flags.forceShare !== true;
  const layers =
    flags.backingChain === true
      ? await describeChain(path, flags.format, lock)
      : [await describeLayer(path, flags.format, lock)];
  if (output.json) printJsonDocument(output, flags.backingChain === true ? layers : layers[0]);
  else printLine(output, layers.map((layer) => infoLines(layer).join("\n")).join("\n\n"));
  return EXIT.done;
}

/** A disk of a backup: what a reader sees of it, and what its manifest says. */
async function runBackupInfo(
  address: string,
  flags: InfoFlags,
  output: CommandContext["output"],
): Promise<number> {
  const image = await openBackup(address, {
    format: flags.format,
    readOnly: true,
    repositoryKey: lazyKey(flags),
  });
  await image.close();
  const { manifest, disk } = image;
  const entry = manifest.disks.find(({ name }) => name === disk);
  const layer: ImageInfoDocument = {
    "virtual-size": roundUp(image.sizeBytes, SECTOR_BYTES),
    filename: address,
    format: "raw",
    "cluster-size": image.clusterSizeBytes,
  };
  const backup = {
    group: manifest.group,
    disk,
    t0: manifest.time,
    level: manifest.level,
    "level-reason": manifest.level_reason,
    parent: manifest.parent,
    chunks: entry?.data_chunk_count ?? 0,
    "new-bytes": entry?.new_bytes ?? 0,
    tool: manifest.tool,
    host: manifest.host,
  };
  if (output.json) {
    const document = { ...layer, backup };
    printJsonDocument(output, flags.backingChain === true ? [document] : document);
    return EXIT.done;
  }
  printLine(output, infoLines(layer).join("\n"));
  printLine(output, `backup of ${backup.t0}, ${backup.level}: ${backup["level-reason"]}`);
  printLine(output, `chunks: ${backup.chunks}`);
  if (manifest.vm_config !== null) printLine(output, `vm config:\n${manifest.vm_config.trimEnd()}`);
  return EXIT.done;
}

async function describeChain(
  path: string,
  format: ImageFormat | undefined,
  lock: boolean,
): Promise<ImageInfoDocument[]> {
  const layers: ImageInfoDocument[] = [];
  const seen = new Set<string>();
  for (let next: string | undefined = path, nextFormat = format; next !== undefined;) {
    const identity = isNbdUri(next) || isRbdAddress(next) ? next : fileIdentity(next);
    if (seen.has(identity)) throw chainError("FORMAT", next, "the backing chain comes back to this file");
    if (layers.length > MAX_BACKING_DEPTH) {
      throw chainError("LIMIT", path, `the backing chain is deeper than ${MAX_BACKING_DEPTH}`);
    }
    seen.add(identity);
    const layer = await describeLayer(next, nextFormat, lock);
    layers.push(layer);
    const below: BackingLayer | undefined = backingLayer(next, layer);
    next = below?.kind === "nbd" ? below.uri : below?.path;
    nextFormat = below?.format;
  }
  return layers;
}

function backingLayer(path: string, layer: ImageInfoDocument): BackingLayer | undefined {
  const name = layer["backing-filename"];
  if (name === undefined || name === "") return undefined;
  const below = resolveBacking(path, name, layer["backing-filename-format"]);
  const full = layer["full-backing-filename"];
  // A path is shown as QEMU joins it.
  return below.kind === "nbd" || full === undefined || hasProtocol(name) ? below : { ...below, path: full };
}

/** A missing file has none: opening it says so better. @throws CowcatcherError IO for a name that leads nowhere */
function fileIdentity(path: string): string {
  try {
    const { dev, ino } = statSync(systemName(path), { throwIfNoEntry: false }) ?? { dev: -1, ino: -1 };
    return `${dev}:${ino}`;
  } catch (error) {
    throw ioError("examine", path, error);
  }
}

function chainError(code: "FORMAT" | "LIMIT", object: string, problem: string): CowcatcherError {
  return new CowcatcherError({ code, object, problem, hint: "leave --backing-chain out" });
}

/** @throws CowcatcherError NOT_FOUND, IO, LOCKED, FORMAT, UNSUPPORTED (a foreign format) */
async function describeLayer(
  path: string,
  format: ImageFormat | undefined,
  lock: boolean,
): Promise<ImageInfoDocument> {
  if (isNbdUri(path)) return describeExport(path, format);
  if (isRbdAddress(path)) return describeRbdImage(path, format);
  const fd = await openImageFile(path, { readOnly: true, direct: false });
  try {
    if (lock) acquireImageLock(fd, path, { write: false });
    const known = format ?? probeFormat(path, readFirstBytes(path, fd, PROBE_BYTES));
    const described = known === "raw" ? describeRaw(path, fd) : describeQcow2(path, fd);
    const tracking = fstatSync(fd).isFile() ? await describeTracking(path) : undefined;
    return { ...described, ...(tracking !== undefined && { tracking }) };
  } finally {
    await closeFile(fd);
  }
}

/** What a client sees of an export; where its data is stored, and how much of it, the server keeps to itself. */
async function describeExport(uri: string, format: ImageFormat | undefined): Promise<ImageInfoDocument> {
  const image = await openImage(uri, { format, readOnly: true });
  await image.close();
  return { "virtual-size": roundUp(image.sizeBytes, SECTOR_BYTES), filename: uri, format: "raw" };
}

/** As QEMU's own driver: an object is what it calls a cluster. */
async function describeRbdImage(
  address: string,
  format: ImageFormat | undefined,
): Promise<ImageInfoDocument> {
  const image = await openImage(address, { format, readOnly: true, lock: false });
  try {
    return {
      "virtual-size": roundUp(image.sizeBytes, SECTOR_BYTES),
      filename: address,
      format: "raw",
      ...(image instanceof RbdImage && {
        "actual-size": image.allocatedBytes,
        "cluster-size": image.objectBytes,
      }),
    };
  } finally {
    await image.close();
  }
}

function describeRaw(path: string, fd: number): ImageInfoDocument {
  const stats = fstatSync(fd);
  return {
    "virtual-size": roundUp(sizeOf(path, fd, stats), SECTOR_BYTES),
    filename: path,
    format: "raw",
    "actual-size": stats.blocks * STAT_BLOCK_BYTES,
    "dirty-flag": false,
  };
}

function describeQcow2(path: string, fd: number): ImageInfoDocument {
  const header = readHeader(
    (buffer, offsetBytes) => readFullySync(path, fd, buffer, 0, buffer.length, offsetBytes),
    path,
  );
  const { "format-specific": specific, ...described } = describeImage(header, new BufferedFile(fd, path));
  const backing = header.backingFile === null ? undefined : backingPath(path, header.backingFile);
  const encrypted = header.cryptMethod !== CRYPT_NONE;
  return {
    ...described,
    "virtual-size": header.sizeBytes,
    filename: path,
    format: "qcow2",
    "actual-size": fstatSync(fd).blocks * STAT_BLOCK_BYTES,
    ...(encrypted && { encrypted }),
    ...(backing !== undefined && { "full-backing-filename": backing }),
    "format-specific": { type: "qcow2", data: { ...specific.data, ...specialData(header) } },
  };
}

/** Of the folder that stands beside the image, where there is one. @throws CowcatcherError IO */
async function describeTracking(path: string): Promise<TrackingDocument | undefined> {
  const folder = path + TRACKING_SUFFIX;
  const tracking = await inspectTracking(folder);
  if (tracking === undefined) return undefined;
  const { state, mode, generation, granularityBytes, epochCount, checkpoints, loss } = tracking;
  return {
    folder,
    state,
    ...(mode !== undefined && { mode }),
    ...(generation !== undefined && { generation }),
    ...(granularityBytes !== undefined && { granularity: granularityBytes }),
    ...(epochCount !== undefined && { epochs: epochCount }),
    checkpoints: checkpoints.map(({ name, uuid, createdMs }) => ({ name, uuid, "created-ms": createdMs })),
    ...(loss !== null && { "loss-reason": loss.reason, "lost-checkpoints": loss.checkpoints }),
  };
}

/** What describeImage leaves to images that this version opens. */
function specialData(header: Qcow2Header): Partial<FormatSpecificDocument> {
  const data: Partial<FormatSpecificDocument> = {};
  if ((header.incompatibleFeatures & INCOMPATIBLE_EXTERNAL_DATA) !== 0n) {
    data["data-file-raw"] = (header.autoclearFeatures & AUTOCLEAR_RAW_EXTERNAL_DATA) !== 0n;
    if (header.externalDataFile !== null) data["data-file"] = header.externalDataFile;
  }
  if (header.cryptMethod !== CRYPT_NONE) {
    data.encrypt = { format: header.cryptMethod === CRYPT_LUKS ? "luks" : "aes" };
  }
  return data;
}

/** As QEMU joins them: the image's folder and the name, with nothing taken out ("d/../a.qcow2", "json:…"). */
function backingPath(imagePath: string, name: string): string {
  if (hasProtocol(name) || isAbsolute(name) || !imagePath.includes("/")) return name;
  const folder = dirname(imagePath);
  return folder === "/" ? `/${name}` : `${folder}/${name}`;
}
