// What the backing file name in a qcow2 header means: a local file or an NBD export, and its format. Pure: nothing is
// opened here.
//
//   NAME                                     a file; a relative one starts from the overlay's folder
//   file:NAME, host_device:NAME              a file
//   json:{OPTIONS}                           a file or an export, as QEMU's -blockdev options say it
//   nbd://…, nbd+tcp://…, nbd+unix://…       an export
//   nbd:unix:PATH[:exportname=NAME], nbd:HOST:PORT[:exportname=NAME]     the same, as it was written before URIs
//
// A name with a colon before any slash is one with a protocol; QEMU does not combine such a name with the overlay's
// folder, so that a relative path within it starts from the folder that the process happens to run in. The same image
// would be another disk elsewhere. Such a path is taken only where the two folders are one, and refused otherwise.
//
// JSON options are flattened to dotted keys ("file.server.path"), nested or not, each of which may be there once.
// Keys are taken out as they are understood, and what is left over is refused: an option that is not known may change
// what the disk reads as. Options that cannot (caching, names of nodes) are let be.
//
// The backing format of the header and the drivers of a json: name must agree. (QEMU lets the header win.) A protocol's
// own name as format ("file", "nbd") means that its bytes are the disk: raw.

import * as path from "node:path";
import { CowcatcherError, type ErrorCode } from "../errors.js";
import { besides, workingFolder } from "../file-names.js";
import {
  NBD_DEFAULT_PORT,
  type NbdAddress,
  formatNbdUri,
  parseNbdUri,
  parseOldNbdName,
} from "../nbd/wire/uri.js";
import { type ImageFormat, isImageFormat } from "../block/format.js";

/** Of a name in a qcow2 header, by the specification. */
export const MAX_BACKING_NAME_BYTES = 1023;
/** Stated bound of nested options; NBD's address below a raw node takes three. */
export const MAX_OPTION_DEPTH = 8;

/** Where the layer below is, and its format; undefined: to be probed. */
export type BackingLayer = (LocalFile | NbdExport) & { format: ImageFormat | undefined };

interface LocalFile {
  kind: "file";
  path: string;
}

interface NbdExport {
  kind: "nbd";
  uri: string;
}

type Scalar = string | number | boolean;

/** Whose name it is, for errors; and the folder that QEMU would start from. */
interface Origin {
  overlayPath: string;
  processFolder: string;
}

/**
 * @param namedFormat the header's backing format, if it has one
 * @throws CowcatcherError FORMAT for a name that makes no sense or contradicts its format, UNSUPPORTED for protocols,
 *   drivers and options that are not known, LIMIT for a json: name that is too long or too deep. All name the overlay.
 */
export function resolveBacking(
  overlayPath: string,
  name: string,
  namedFormat: string | null = null,
  processFolder: string = workingFolder(),
): BackingLayer {
  const origin = { overlayPath, processFolder };
  const layer = placeOf(origin, name);
  return { ...layer, format: agreedFormat(origin, layer, namedFormat) };
}

/** Whether QEMU takes the name for one with a protocol, and so leaves it as it is. */
export function hasProtocol(name: string): boolean {
  return /^[^/:]*:/.test(name);
}

function placeOf(origin: Origin, name: string): BackingLayer {
  if (!hasProtocol(name)) {
    return localFile(besides(origin.overlayPath, name));
  }
  const protocol = name.slice(0, name.indexOf(":"));
  const rest = name.slice(protocol.length + 1);
  switch (protocol) {
    case "file":
    case "host_device":
      return localFile(ownPath(origin, rest));
    case "json":
      return fromJson(origin, name, rest);
    case "nbd":
      return rest.startsWith("//") ? fromUri(origin, name) : fromOldName(origin, name);
    case "nbd+tcp":
    case "nbd+unix":
      return fromUri(origin, name);
    default:
      throw unsupported(
        origin,
        `its backing file is '${protocol}:…', which is neither a file nor an NBD export`,
        protocol.startsWith("nbds")
          ? "QEMU's names have no TLS; copy the backing file to a local one"
          : "copy the backing chain to local files first, for example with qemu-img convert",
      );
  }
}

function localFile(filePath: string): BackingLayer {
  return { kind: "file", path: filePath, format: undefined };
}

function nbdExport(address: NbdAddress): BackingLayer {
  return { kind: "nbd", uri: formatNbdUri(address), format: undefined };
}

function agreedFormat(
  origin: Origin,
  layer: BackingLayer,
  namedFormat: string | null,
): ImageFormat | undefined {
  if (namedFormat === null || namedFormat === "") return layer.format;
  const protocols = layer.kind === "nbd" ? ["nbd"] : ["file", "host_device"];
  const format = protocols.includes(namedFormat) ? "raw" : namedFormat;
  if (!isImageFormat(format)) {
    throw unsupported(origin, `its backing file has the format '${namedFormat}', which is not supported`);
  }
  if (layer.format !== undefined && layer.format !== format) {
    throw formatError(
      origin,
      `its backing format is '${namedFormat}', and the json: name of its backing file says '${layer.format}'`,
      "correct one of them with qemu-img rebase -u",
    );
  }
  return format;
}

/** A path within a name that has a protocol: as QEMU takes it, or not at all (see above). */
function ownPath(origin: Origin, name: string): string {
  const { overlayPath, processFolder } = origin;
  if (name === "") throw formatError(origin, "its backing file name names no path");
  if (name.includes("\0")) throw formatError(origin, "its backing file name has a zero byte in it");
  if (path.isAbsolute(name)) return name;
  const folder = path.dirname(overlayPath);
  if (path.resolve(processFolder, folder) === path.resolve(processFolder)) return besides(overlayPath, name);
  throw unsupported(
    origin,
    `the path '${name}' in its backing file name starts, in QEMU, from the folder that one runs it in`,
    "run it in the image's folder, or write an absolute path with qemu-img rebase -u",
  );
}

// NBD

function fromUri(origin: Origin, name: string): BackingLayer {
  const address = parsedUri(origin, name);
  return nbdExport("path" in address ? { ...address, path: ownPath(origin, address.path) } : address);
}

function parsedUri(origin: Origin, name: string): NbdAddress {
  return parsedName(origin, name, () => {
    const address = parseNbdUri(name);
    if (!/^nbd(?:\+tcp)?:\/\/(?:[:/?]|$)/.test(name)) return address;
    // As QEMU: what an image names does not mean whichever machine it is opened on.
    throw new CowcatcherError({ code: "USAGE", object: name, problem: "names no host" });
  });
}

/** What is wrong with the name is wrong with the image that has it. */
function parsedName(origin: Origin, name: string, parse: (name: string) => NbdAddress): NbdAddress {
  try {
    return parse(name);
  } catch (error) {
    if (!(error instanceof CowcatcherError)) throw error;
    const code = error.code === "UNSUPPORTED" ? "UNSUPPORTED" : "FORMAT";
    throw nameError(code, origin, `its backing file name '${name}' ${error.problem}`, error.hint);
  }
}

function fromOldName(origin: Origin, name: string): BackingLayer {
  const address = parsedName(origin, name, parseOldNbdName);
  return nbdExport("path" in address ? { ...address, path: ownPath(origin, address.path) } : address);
}

/** It becomes part of a URI: nothing in it may end the host there. */
function checkedHost(origin: Origin, host: string): string {
  if (/^[\w.-]+$/.test(host) || /^[0-9a-f]*:[0-9a-f:.]*$/i.test(host)) return host;
  throw formatError(origin, `its backing file name has the host '${host}', which is none`);
}

function checkedPort(origin: Origin, port: Scalar): number {
  const number = /^\d{1,5}$/.test(String(port)) ? Number(port) : 0;
  if (number >= 1 && number <= 65_535) return number;
  throw formatError(origin, `its backing file name has the port '${port}'`, "write a number of 1 to 65535");
}

// json:

function fromJson(origin: Origin, name: string, text: string): BackingLayer {
  if (Buffer.byteLength(name) > MAX_BACKING_NAME_BYTES) {
    throw nameError("LIMIT", origin, `its backing file name is longer than ${MAX_BACKING_NAME_BYTES} bytes`);
  }
  const options = new Options(origin, text);
  const layer = readNode(options, "", 1);
  options.refuseRest();
  return layer;
}

/** A node of QEMU's block graph whose options begin with `prefix`, down to its file or export. */
function readNode(options: Options, prefix: string, depth: number): BackingLayer {
  if (depth > MAX_OPTION_DEPTH) throw tooDeep(options.origin);
  const isTop = prefix === "";
  const driver = options.takeText(`${prefix}driver`) ?? (isTop ? undefined : "file");
  switch (driver) {
    case undefined:
    case "raw":
    case "qcow2":
      return readFormatNode(options, prefix, depth, driver);
    case "file":
    case "host_device": {
      const name = options.needText(`${prefix}filename`);
      // Named as the disk itself, it is nothing but its bytes; below a format, that one decides.
      return { ...localFile(ownPath(options.origin, name)), format: isTop ? "raw" : undefined };
    }
    case "nbd":
      return { ...nbdExport(readNbdAddress(options, prefix)), format: isTop ? "raw" : undefined };
    default:
      throw unsupported(
        options.origin,
        `the json: name of its backing file has the driver '${driver}', which is not supported`,
        "there are raw and qcow2, and below them file, host_device and nbd",
      );
  }
}

/** @param format undefined: to be probed */
function readFormatNode(
  options: Options,
  prefix: string,
  depth: number,
  format: ImageFormat | undefined,
): BackingLayer {
  for (const key of ["offset", "size"]) {
    if (format === "raw" && options.has(`${prefix}${key}`)) {
      throw unsupported(
        options.origin,
        `the json: name of its backing file takes a part of a raw file ('${prefix}${key}'), which is not supported`,
        "copy that part to a file of its own with qemu-img convert",
      );
    }
  }
  if (options.has(`${prefix}file`)) {
    throw unsupported(
      options.origin,
      `the json: name of its backing file refers to a node ('${prefix}file'), and there are none here`,
      'write the options of the file: {"file":{"driver":"file","filename":…}}',
    );
  }
  if (!options.hasBelow(`${prefix}file.`)) {
    throw formatError(
      options.origin,
      `the json: name of its backing file has no '${prefix}file'`,
      'write {"driver":FORMAT,"file":{"driver":"file","filename":…}}',
    );
  }
  const below = readNode(options, `${prefix}file.`, depth + 1);
  if (below.format !== "qcow2") return { ...below, format };
  throw unsupported(
    options.origin,
    "the json: name of its backing file puts a format upon qcow2, which is not supported",
    "name qcow2 alone",
  );
}

function readNbdAddress(options: Options, prefix: string): NbdAddress {
  const { origin } = options;
  const exportName = options.takeText(`${prefix}export`) ?? "";
  for (const key of ["tls-creds", "tls-hostname"]) {
    if (options.has(`${prefix}${key}`)) {
      throw unsupported(
        origin,
        `the json: name of its backing file wants TLS ('${prefix}${key}'), whose keys only QEMU's own objects name`,
        "copy the backing file to a local one",
      );
    }
  }
  // Before there was 'server', path or host and port stood in its place.
  const isOld = !options.hasBelow(`${prefix}server.`);
  const server = isOld ? prefix : `${prefix}server.`;
  const type = isOld ? (options.has(`${prefix}path`) ? "unix" : "inet") : options.needText(`${server}type`);
  if (type === "unix") return { path: ownPath(origin, options.needText(`${server}path`)), exportName };
  if (type !== "inet") {
    throw unsupported(
      origin,
      `the json: name of its backing file has an NBD server of the type '${type}', which is not supported`,
      "there are unix and inet",
    );
  }
  const host = checkedHost(origin, options.needText(`${server}host`));
  const port = options.take(`${server}port`) ?? (isOld ? NBD_DEFAULT_PORT : "");
  return { host, port: checkedPort(origin, port), exportName };
}

/** They change nothing of what is read; what is opened is read-only and locked whatever they say. */
const IGNORED_OPTIONS = new Set([
  "aio",
  "auto-read-only",
  "cache.direct",
  "cache.no-flush",
  "detect-zeroes",
  "discard",
  "force-share",
  "locking",
  "node-name",
  "open-timeout",
  "read-only",
  "reconnect-delay",
]);

/** Options by dotted keys. What was understood is taken out. */
class Options {
  readonly #values = new Map<string, Scalar>();

  /** @throws CowcatcherError FORMAT, LIMIT */
  constructor(
    readonly origin: Origin,
    text: string,
  ) {
    const tree = parsedJson(origin, text);
    if (typeof tree !== "object" || tree === null || Array.isArray(tree)) {
      throw formatError(origin, "the json: name of its backing file is no object");
    }
    const keyCount = this.#add(tree, "", 1);
    if (keyCount !== countKeys(text)) {
      throw formatError(origin, "the json: name of its backing file gives an option twice");
    }
  }

  /** @returns how many keys there are in the object, those within it included */
  #add(object: object, prefix: string, depth: number): number {
    if (depth > MAX_OPTION_DEPTH) throw tooDeep(this.origin);
    let count = 0;
    for (const [name, value] of Object.entries(object) as [string, unknown][]) {
      const key = prefix + name;
      count++;
      if (typeof value === "string" || typeof value === "number" || typeof value === "boolean") {
        if (this.#values.has(key)) {
          throw formatError(this.origin, `the json: name of its backing file gives '${key}' twice`);
        }
        this.#values.set(key, value);
      } else if (typeof value === "object" && value !== null && !Array.isArray(value)) {
        count += this.#add(value, `${key}.`, depth + 1);
      } else {
        throw unsupported(
          this.origin,
          `the json: name of its backing file has an array or null as the option '${key}', which is not supported`,
        );
      }
    }
    return count;
  }

  has(key: string): boolean {
    return this.#values.has(key);
  }

  hasBelow(prefix: string): boolean {
    return [...this.#values.keys()].some((key) => key.startsWith(prefix));
  }

  take(key: string): Scalar | undefined {
    const value = this.#values.get(key);
    this.#values.delete(key);
    return value;
  }

  takeText(key: string): string | undefined {
    const value = this.take(key);
    if (value === undefined || typeof value === "string") return value;
    throw formatError(
      this.origin,
      `the option '${key}' in the json: name of its backing file is not a string`,
    );
  }

  needText(key: string): string {
    const value = this.takeText(key);
    if (value !== undefined) return value;
    throw formatError(this.origin, `the json: name of its backing file has no '${key}'`);
  }

  refuseRest(): void {
    for (const key of this.#values.keys()) {
      if (IGNORED_OPTIONS.has(key.replace(/^(file\.)*/, ""))) continue;
      throw unsupported(
        this.origin,
        `the json: name of its backing file has the option '${key}', which is not supported`,
        "leave it out with qemu-img rebase -u, if the disk is the same without it",
      );
    }
  }
}

function parsedJson(origin: Origin, text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    throw formatError(
      origin,
      "the json: name of its backing file is not valid JSON",
      "names and strings stand in double quotes",
    );
  }
}

/** Of valid JSON, where a colon follows a string that is a key and no other. JSON.parse lets the last of two win. */
function countKeys(text: string): number {
  let count = 0;
  for (const [, colon] of text.matchAll(/"(?:[^"\\]|\\.)*"(\s*:)?/g)) if (colon !== undefined) count++;
  return count;
}

function tooDeep(origin: Origin): CowcatcherError {
  return nameError(
    "LIMIT",
    origin,
    `the json: name of its backing file is nested deeper than ${MAX_OPTION_DEPTH}`,
  );
}

function formatError(
  origin: Origin,
  problem: string,
  hint = "correct the name with qemu-img rebase -u",
): CowcatcherError {
  return nameError("FORMAT", origin, problem, hint);
}

function unsupported(origin: Origin, problem: string, hint?: string): CowcatcherError {
  return nameError("UNSUPPORTED", origin, problem, hint);
}

function nameError(
  code: ErrorCode,
  { overlayPath }: Origin,
  problem: string,
  hint?: string,
): CowcatcherError {
  return new CowcatcherError({ code, object: overlayPath, problem, hint });
}
