// Nodes that clients add with blockdev-add, to write backups to: raw and qcow2 over a file, and exports. A node is a name
// for a place; it is opened when a backup is written to it. Main thread; at most NODE_COUNT_MAX.

import { stat } from "node:fs/promises";
import type { BackupJob } from "../backup/host.js";
import { type ImageFormat, isImageFormat } from "../block/format.js";
import type { ExportHost } from "./export-host.js";
import { absoluteName } from "../file-names.js";
import { errnoOf } from "../errors.js";
import { formatNbdUri } from "../nbd/wire/uri.js";
import { genericError, isJsonObject, notSupported } from "../qmp/protocol.js";
import type { JsonObject } from "../qmp/protocol.js";
import { checkMembers, fileName, object, oneOf, optional, string, type Type } from "../qmp/schema.js";

/** A backup uses one for each disk; more than this is a script that removes none. */
const NODE_COUNT_MAX = 256;

export interface TargetNode {
  name: string;
  /** As drive-backup's target. */
  path: string;
  format: ImageFormat;
  /** It was added so: nobody may write to it. */
  readOnly: boolean;
  /** What is to be read below it is not what its header says: a target all the same, but no image to be opened here. */
  hasOtherBacking: boolean;
}

const anything: Type<unknown> = { check: (value) => value };
/** What QEMU takes of every node, and what is not about where the data goes: nothing to a target. */
const COMMON = {
  driver: oneOf(["file", "host_device", "raw", "qcow2", "nbd"]),
  "node-name": optional(string),
  "read-only": optional(anything),
  "auto-read-only": optional(anything),
  discard: optional(anything),
  cache: optional(anything),
  "detect-zeroes": optional(anything),
};
const FILE = { ...COMMON, filename: fileName, aio: optional(anything), locking: optional(anything) };
const FORMAT = { ...COMMON, file: anything, backing: optional(anything) };
const NBD = {
  ...COMMON,
  server: object({
    type: oneOf(["inet", "unix"]),
    host: optional(string),
    port: optional(string),
    path: optional(fileName),
  }),
  export: optional(string),
  "reconnect-delay": optional(anything),
  "open-timeout": optional(anything),
};

export class TargetNodes {
  readonly #nodes = new Map<string, TargetNode>();

  get(name: string): TargetNode | undefined {
    return this.#nodes.get(name);
  }

  /**
   * @param taken names of the server's disks
   * @throws QmpError GenericError for what is not a place to write a backup to, or whose name is taken.
   */
  async add(options: JsonObject, taken: readonly string[]): Promise<void> {
    const { "node-name": name } = options;
    if (typeof name !== "string") throw genericError("'node-name' must be specified for the root node");
    if (!/^[A-Za-z][A-Za-z0-9._-]{0,30}$/.test(name)) throw genericError(`Invalid node-name: '${name}'`);
    if (taken.includes(name) || this.#nodes.has(name)) {
      throw genericError(`Duplicate nodes with node-name='${name}'`);
    }
    if (this.#nodes.size >= NODE_COUNT_MAX) throw genericError(`There are ${NODE_COUNT_MAX} nodes already`);
    const place = this.#placeOf(options, "");
    const readOnly = options["read-only"] === true;
    const node = {
      name,
      path: place.path,
      format: place.format ?? "raw",
      readOnly,
      hasOtherBacking: this.#hasOtherBacking(options, taken),
    };
    if (place.isFile) await requireFile(node.path);
    this.#nodes.set(name, node);
  }

  /** @throws QmpError GenericError where there is none, or a job writes to it. */
  remove(name: string, jobs: readonly BackupJob[], exports?: Pick<ExportHost, "isOpened">): void {
    const node = this.#nodes.get(name);
    if (node === undefined) throw genericError(`Failed to find node with node-name='${name}'`);
    if (exports?.isOpened(name) === true) throw genericError(`Node ${name} is in use`);
    const isInUse = jobs.some(
      ({ status, options }) => status !== "concluded" && options.target === node.path,
    );
    if (isInUse) throw genericError(`Node '${name}' is busy: block device is in use by block job: backup`);
    this.#nodes.delete(name);
  }

  /** Nothing, or a node, in place of what the image's header names: the header stays as it is, as in QEMU. */
  #hasOtherBacking({ backing }: JsonObject, taken: readonly string[]): boolean {
    if (backing === undefined) return false;
    if (backing !== null && typeof backing !== "string")
      throw notSupported("A 'backing' that is no node's name");
    if (backing === null || taken.includes(backing) || this.#nodes.has(backing)) return true;
    throw genericError(
      `Could not open backing file: Cannot find device='${backing}' nor node-name='${backing}'`,
    );
  }

  #placeOf(options: JsonObject, path: string): { path: string; format?: ImageFormat; isFile: boolean } {
    const { driver } = options;
    if (driver === "nbd") return { path: uriOf(checkMembers(options, NBD, path)), isFile: false };
    if (driver === "file" || driver === "host_device") {
      return { path: absoluteName(checkMembers(options, FILE, path).filename), isFile: true };
    }
    if (typeof driver === "string" && !isImageFormat(driver))
      throw genericError(`Unknown driver '${driver}'`);
    const { driver: format, file, backing } = checkMembers(options, FORMAT, path);
    if (backing !== undefined && format === "raw") throw genericError("Parameter 'backing' is unexpected");
    const below = this.#below(file);
    if (below.format === "qcow2") throw notSupported("A format over qcow2");
    if (format === "qcow2" && !below.isFile) throw notSupported("qcow2 over nbd");
    return { ...below, format: format === "qcow2" ? "qcow2" : "raw" };
  }

  #below(file: unknown): { path: string; format?: ImageFormat; isFile: boolean } {
    if (isJsonObject(file)) return this.#placeOf(file, "file");
    if (typeof file !== "string") {
      throw genericError("Invalid parameter type for 'file', expected: string, object");
    }
    const node = this.#nodes.get(file);
    if (node === undefined) throw genericError(`Cannot find device='' nor node-name='${file}'`);
    return { path: node.path, format: node.format, isFile: !node.path.includes("://") };
  }
}

function uriOf({ server, export: name = "" }: { server: NbdServer; export?: string | undefined }): string {
  const { type, host, port, path } = server;
  if (type === "unix") {
    if (path === undefined) throw genericError("Parameter 'server.path' is missing");
    return formatNbdUri({ exportName: name, path });
  }
  if (host === undefined || port === undefined) {
    throw genericError(`Parameter 'server.${host === undefined ? "host" : "port"}' is missing`);
  }
  return formatNbdUri({ exportName: name, host, port: Number(port) });
}

interface NbdServer {
  type: "inet" | "unix";
  host?: string | undefined;
  port?: string | undefined;
  path?: string | undefined;
}

/** @throws QmpError GenericError, in QEMU's words, where there is nothing. */
export async function requireFile(path: string): Promise<void> {
  try {
    await stat(path);
  } catch (error) {
    const reason = errnoOf(error) === "ENOENT" ? "No such file or directory" : (errnoOf(error) ?? "unknown");
    throw genericError(`Could not open '${path}': ${reason}`);
  }
}
