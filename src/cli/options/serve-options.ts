// The options of `serve`, from commander's loose values to typed settings.
import { statSync } from "node:fs";
import { Option, type Command } from "commander";
import { JOB_DEFAULTS } from "../../backup/options.js";
import type { ImageFormat } from "../../block/format.js";
import { absoluteName } from "../../file-names.js";
import { formatBytes } from "../../units.js";
import { isOldNbdName } from "../../nbd/wire/uri.js";
import { MAX_STRING_BYTES } from "../../nbd/wire/protocol.js";
import { TRACKING_MODES, type TrackingMode } from "../../tracking/head.js";
import type { TlsSettings } from "../../nbd/server/tls.js";
import {
  bufferSizeOption,
  choiceOption,
  countOption,
  formatOption,
  absoluteImage,
  isNbdUri,
  isRbdAddress,
  parseImage,
  parseText,
  pathOption,
  textOption,
  unsupported,
  usageError,
} from "./options.js";
import { groupIdOf } from "./groups.js";
import { addTlsOptions, parseTls, type TlsFlags } from "./serve-tls.js";
import type { Environment } from "../output/context.js";

export interface ServedImage {
  path: string;
  /** Node name and export name. */
  name: string;
  /** Undefined: probe. */
  format: ImageFormat | undefined;
}

export type ListenSettings =
  /** `mode`: permission bits of the socket's file; undefined: what the umask leaves. */
  | { type: "unix"; path: string; mode: number | undefined; groupId: number | undefined }
  | { type: "tcp"; address: string; port: number }
  /** Sockets that systemd has opened: `count` file descriptors from 3 on. */
  | { type: "inherited"; count: number };

/** Permission bits and group of a socket's file. */
export interface SocketAccess {
  mode?: number | undefined;
  groupId?: number | undefined;
}

export interface ServeSettings {
  /** At least one. */
  images: ServedImage[];
  listen: ListenSettings;
  /** Path of the control socket. */
  control: string | undefined;
  /** Who may use it besides the server's user; undefined members: nobody. */
  controlAccess: SocketAccess;
  readOnly: boolean;
  /** O_DIRECT for the images. */
  direct: boolean;
  /** The default for its jobs. */
  cowBufferSizeBytes: number;
  /** That much memory has its pages before the server listens. */
  preallocate: boolean;
  /** The T0 view of each job's disk is an export. */
  snapshotExport: boolean;
  maxConnections: number;
  /** Where metrics are told; undefined: nowhere. */
  metrics: { host: string; port: number } | undefined;
  /** Persistent bitmaps to offer as metadata contexts. */
  bitmaps: string[];
  tracking: TrackingSettings;
  /** Undefined: off. */
  tls: TlsSettings | undefined;
}

export interface TrackingSettings {
  mode: TrackingMode | "off";
  /** Of the folders, one for each disk; undefined: beside the images. */
  directory: string | undefined;
  /** By an option, so that a disk that cannot be tracked is an error. */
  isAskedFor: boolean;
}

export interface ServeFlags extends TlsFlags {
  socket?: string;
  socketMode?: number;
  socketGroup?: number;
  controlMode?: number;
  controlGroup?: number;
  bitmap?: string[];
  port?: number;
  bind?: string;
  control?: string;
  format?: ImageFormat;
  readOnly?: boolean;
  direct?: boolean;
  name?: string;
  cowBufferSize?: number;
  preallocate?: boolean;
  metrics?: { host: string; port: number };
  snapshotExport?: boolean;
  tracking?: TrackingMode | "off";
  trackingDir?: string;
  maxConnections?: number;
}

const DEFAULT_NAME = "disk";
const DEFAULT_ADDRESS = "127.0.0.1";
const PORT_BOUNDS = { min: 0, max: 65_535 };
const CONNECTION_BOUNDS = { min: 1, max: 1024 };
// A guest's device opens one, or as many as it has queues; backups, checks and copies open some more. What a
// connection that is idle costs is address space.
const DEFAULT_MAX_CONNECTIONS = 128;

export function addServeOptions(command: Command): Command {
  return addTlsOptions(addImageOptions(command));
}

function addImageOptions(command: Command): Command {
  const buffer = formatBytes(JOB_DEFAULTS.cowBufferSizeBytes);
  return command
    .addOption(pathOption("--socket <PATH>", "listen on a Unix socket"))
    .addOption(
      new Option(
        "--socket-mode <MODE>",
        "permissions of the Unix socket, octal (0777 less the umask)",
      ).argParser((text) => parseMode(text, "--socket-mode")),
    )
    .addOption(
      groupOption("--socket-group <GROUP>", "group of the Unix socket; mode 660 then (the server's)"),
    )
    .addOption(countOption("--port <N>", "listen on a TCP port (0: any free one)", PORT_BOUNDS))
    .addOption(textOption("--bind <ADDR>", `address of the TCP port (${DEFAULT_ADDRESS})`))
    .addOption(pathOption("--control <PATH>", "control socket (QMP) for backups and jobs (none)"))
    .addOption(
      new Option("--control-mode <MODE>", "permissions of the control socket, octal (600)").argParser(
        (text) => parseMode(text, "--control-mode"),
      ),
    )
    .addOption(
      groupOption("--control-group <GROUP>", "group of the control socket; mode 660 then (the server's)"),
    )
    .addOption(formatOption("-f, --format <FMT>", "raw or qcow2, of every IMAGE (probed)"))
    .option("--read-only", "refuse the guest's writes")
    .option("--direct", "O_DIRECT for the images")
    .addOption(
      new Option(
        "--bitmap <NAME>",
        "with --read-only: offer a qcow2 bitmap as qemu:dirty-bitmap:NAME; repeatable",
      ).argParser((name: string, earlier: string[] = []) => [...earlier, parseText(name, "--bitmap")]),
    )
    .addOption(textOption("--name <NAME>", `name of a single image (${DEFAULT_NAME})`))
    .addOption(
      bufferSizeOption(
        "--cow-buffer-size <SIZE>",
        `copy-before-write buffer, the default for its jobs (${buffer})`,
      ),
    )
    .addOption(
      new Option(
        "--metrics <ADDR:PORT>",
        "Prometheus metrics at http://ADDR:PORT/metrics, for whoever can connect (none)",
      ).argParser(parseMetricsPlace),
    )
    .option("--preallocate", "make all of that buffer's memory ready before listening")
    .option(
      "--snapshot-export",
      "export NAME-snapshot while a backup of NAME runs: the disk as the backup sees it",
    )
    .addOption(
      choiceOption(
        "--tracking <MODE>",
        "remember what changes, for `backup --since`: host (through power loss), process (through kill -9) or off (host)",
        [...TRACKING_MODES, "off"] as const,
      ),
    )
    .addOption(
      pathOption(
        "--tracking-dir <DIR>",
        "where that is kept: DIR/NAME.cowcatcher (IMAGE.cowcatcher beside each image)",
      ),
    )
    .addOption(
      countOption(
        "--max-connections <N>",
        `guests connected at the same time (${DEFAULT_MAX_CONNECTIONS})`,
        CONNECTION_BOUNDS,
      ),
    );
}

/** @throws CowcatcherError USAGE */
function parseMetricsPlace(text: string): { host: string; port: number } {
  const [, host, port] = /^(.+):(\d{1,5})$/.exec(text) ?? [];
  if (host === undefined || !(Number(port) <= PORT_BOUNDS.max)) {
    throw usageError("--metrics", `'${text}' is no address`, "give ADDR:PORT, such as 127.0.0.1:9101");
  }
  return { host: host.replace(/^\[(.*)\]$/, "$1"), port: Number(port) };
}

function parsePreallocate({ preallocate = false, cowBufferSize }: ServeFlags): boolean {
  if (preallocate && cowBufferSize === 0) {
    throw usageError(
      "--preallocate",
      "there is no buffer with --cow-buffer-size 0",
      "give a size, or leave it out",
    );
  }
  return preallocate;
}

/**
 * The settings of `serve IMAGE[=NAME]…`.
 * @param environment where systemd's LISTEN_FDS and LISTEN_PID are looked for
 * @throws CowcatcherError USAGE for a combination that cannot mean anything, UNSUPPORTED for an NBD URI.
 */
export function parseServeSettings(
  images: readonly string[],
  flags: ServeFlags,
  environment: Environment,
  processId: number,
): ServeSettings {
  return {
    images: parseImages(images, flags),
    listen: parseListen(flags, environment, processId),
    control: flags.control,
    controlAccess: parseControlAccess(flags),
    readOnly: flags.readOnly ?? false,
    direct: flags.direct ?? false,
    cowBufferSizeBytes: flags.cowBufferSize ?? JOB_DEFAULTS.cowBufferSizeBytes,
    preallocate: parsePreallocate(flags),
    metrics: flags.metrics,
    snapshotExport: flags.snapshotExport ?? false,
    maxConnections: flags.maxConnections ?? DEFAULT_MAX_CONNECTIONS,
    bitmaps: parseBitmaps(flags),
    tracking: parseTracking(flags),
    tls: parseTls(flags),
  };
}

function parseTracking({ tracking, trackingDir, readOnly }: ServeFlags): TrackingSettings {
  if (trackingDir !== undefined && tracking === "off") {
    throw usageError("--tracking-dir", "does not go with --tracking off");
  }
  const asked = trackingDir !== undefined ? "--tracking-dir" : "--tracking";
  const isAskedFor = trackingDir !== undefined || (tracking !== undefined && tracking !== "off");
  if (isAskedFor && readOnly === true) {
    throw usageError(asked, "does not go with --read-only", "nothing changes that could be tracked");
  }
  return {
    mode: tracking ?? "host",
    directory: trackingDir === undefined ? undefined : absoluteName(trackingDir),
    isAskedFor,
  };
}

function parseBitmaps({ bitmap = [], readOnly }: ServeFlags): string[] {
  if (bitmap.length > 0 && readOnly !== true) {
    throw usageError("--bitmap", "needs --read-only", "guest writes are not recorded in bitmaps");
  }
  return [...new Set(bitmap)];
}

function parseControlAccess({ control, controlMode: mode, controlGroup: groupId }: ServeFlags): SocketAccess {
  if (control === undefined && mode !== undefined) throw usageError("--control-mode", "needs --control");
  if (control === undefined && groupId !== undefined) throw usageError("--control-group", "needs --control");
  return { mode, groupId };
}

function groupOption(flags: string, help: string): Option {
  const name = flags.slice(0, flags.indexOf(" "));
  return new Option(flags, help).argParser((text) => groupIdOf(text, name));
}

function parseMode(text: string, option: string): number {
  if (!/^0?[0-7]{3}$/.test(text)) {
    throw usageError(option, `'${text}' is not a mode`, "give three octal digits, such as 660");
  }
  return Number.parseInt(text, 8);
}

function parseImages(texts: readonly string[], flags: ServeFlags): ServedImage[] {
  if (texts.length === 0) throw usageError("IMAGE", "is missing");
  const rbd = texts.find(isRbdAddress);
  if (rbd !== undefined) {
    throw unsupported(
      rbd,
      "an RBD image is not served to a guest",
      "give the guest QEMU's own rbd driver, or map the image with `rbd map` and serve /dev/rbdN",
    );
  }
  const split = texts.map(splitName);
  if (flags.name !== undefined && (split.length > 1 || split[0]?.name !== undefined)) {
    throw usageError("--name", "is for a single image", "give each image a name as IMAGE=NAME");
  }
  const images = split.map(({ path, name }) => {
    if (name === undefined && split.length > 1) {
      throw usageError(path, "has no name", "with several images, give each as IMAGE=NAME");
    }
    const image = parseImage(path);
    // A connection may have to be made anew when the working folder is another.
    return {
      path: isNbdUri(image) ? absoluteImage(image) : image,
      name: name ?? flags.name ?? DEFAULT_NAME,
      format: flags.format,
    };
  });
  const names = images.map(({ name }) => name);
  const long = names.find((name) => Buffer.byteLength(name) > MAX_STRING_BYTES);
  if (long !== undefined)
    throw usageError("IMAGE", `an export's name has more than ${MAX_STRING_BYTES} bytes`);
  const repeated = names.find((name, index) => names.indexOf(name) !== index);
  if (repeated !== undefined) throw usageError("IMAGE", `the name '${repeated}' is given twice`);
  if (flags.readOnly !== true) refuseSameFile(images);
  return images;
}

/** Two guests on one disk. The image's lock would refuse it, too, but as if another program were in the way. */
function refuseSameFile(images: readonly ServedImage[]): void {
  const seen = new Map<string, string>();
  for (const { path, name } of images) {
    const identity = isNbdUri(path) ? undefined : fileIdentity(path);
    if (identity === undefined) continue;
    const other = seen.get(identity);
    if (other !== undefined) {
      throw usageError(path, `is '${other}' and '${name}' at once`, "serve it once, or with --read-only");
    }
    seen.set(identity, name);
  }
}

/** Undefined where there is none, which opening it says better. */
function fileIdentity(path: string): string | undefined {
  try {
    const { dev, ino } = statSync(path);
    return `${dev}:${ino}`;
  } catch {
    return undefined;
  }
}

/** A path may hold "=" itself, so the name is what follows the last one, unless a folder does. */
function splitName(text: string): { path: string; name: string | undefined } {
  // In a URI's query the last parameter has its own "=" first.
  const isBareUri =
    (isNbdUri(text) && /[?&][^=&]*=[^=&]*$/.test(text)) ||
    (isOldNbdName(text) && /:exportname=[^=]*$/.test(text));
  const match = isBareUri ? null : /^(.+)=([^=/]+)$/s.exec(text);
  return match?.[1] === undefined ? { path: text, name: undefined } : { path: match[1], name: match[2] };
}

function parseListen(
  { socket, socketMode, socketGroup, port, bind, control }: ServeFlags,
  environment: Environment,
  processId: number,
): ListenSettings {
  if (socket !== undefined && port !== undefined) throw usageError("--port", "does not go with --socket");
  if (bind !== undefined && port === undefined) throw usageError("--bind", "needs --port");
  if (socket !== undefined && control !== undefined && absoluteName(socket) === absoluteName(control)) {
    throw usageError("--control", "is the path of --socket", "give another path");
  }
  if (socketMode !== undefined && socket === undefined) throw usageError("--socket-mode", "needs --socket");
  if (socketGroup !== undefined && socket === undefined) throw usageError("--socket-group", "needs --socket");
  if (socket !== undefined) return { type: "unix", path: socket, mode: socketMode, groupId: socketGroup };
  if (port !== undefined) return { type: "tcp", address: bind ?? DEFAULT_ADDRESS, port };
  const count = inheritedSocketCount(environment, processId);
  if (count > 0) return { type: "inherited", count };
  throw usageError("serve", "does not know where to listen", "give --socket PATH or --port N");
}

/** sd_listen_fds(3): LISTEN_PID must be this process, else the variables were meant for a parent. */
function inheritedSocketCount({ LISTEN_FDS, LISTEN_PID }: Environment, processId: number): number {
  if (LISTEN_PID !== String(processId) || LISTEN_FDS === undefined) return 0;
  return /^\d{1,4}$/.test(LISTEN_FDS) ? Number(LISTEN_FDS) : 0;
}
