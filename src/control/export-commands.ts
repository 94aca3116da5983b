// Exports that come and go while the server runs: of its disks, of images that blockdev-add named, and of the T0 view of a
// job. Checks and words are QEMU's (block/export/export.c, nbd/server.c); what they are about, the server's (ExportHost).
//
//   blockdev-add              a name for a place, no more
//   block-export-add          of such a name: its image is opened, and is a disk of the server from then on
//   block-export-del          of its last export: the image is closed, its disk is gone
//   blockdev-del              the name goes, too

import { isOver, type JobHost } from "../backup/host.js";
import { NBD_META_DIRTY_BITMAP_PREFIX } from "../nbd/wire/protocol.js";
import { genericError, notSupported } from "../qmp/protocol.js";
import type { JsonObject } from "../qmp/protocol.js";
import { boolean, list, oneOf, optional, string } from "../qmp/schema.js";
import type { Arguments } from "../qmp/schema.js";
import { BITMAP_OR_NAME } from "./bitmap-commands.js";
import { type Command, command, type CommandContext } from "./command.js";
import type { ExportHost, ServedExport } from "./export-host.js";
import type { TargetNode } from "./target-nodes.js";

/** Of the protocol (NBD_MAX_STRING_SIZE). */
const TEXT_BYTES_MAX = 4096;

const EXPORT_ADD = {
  type: oneOf(["nbd", "vhost-user-blk", "fuse", "vduse-blk"]),
  id: string,
  "fixed-iothread": optional(boolean),
  iothread: optional(string),
  "node-name": string,
  writable: optional(boolean),
  writethrough: optional(boolean),
  name: optional(string),
  description: optional(string),
  bitmaps: optional(list(BITMAP_OR_NAME)),
  "allocation-depth": optional(boolean),
};
const EXPORT_DEL = { id: string, mode: optional(oneOf(["safe", "hard"])) };

type AddArguments = Arguments<typeof EXPORT_ADD>;

async function addExport(args: AddArguments, context: CommandContext): Promise<JsonObject> {
  const exports = hostOf(context);
  refuseUnsupported(args);
  if (!/^[A-Za-z][A-Za-z0-9._-]*$/.test(args.id)) throw genericError("Invalid block export id");
  if (exports.list().some(({ id }) => id === args.id)) {
    throw genericError(`Block export id '${args.id}' is already in use`);
  }
  const { "node-name": nodeName, writable: isWritable = false } = args;
  const name = args.name ?? nodeName;
  for (const [what, text] of [
    ["export name", name],
    ["description", args.description ?? ""],
  ]) {
    if (Buffer.byteLength(text ?? "") > TEXT_BYTES_MAX) throw genericError(`${what} '${text}' too long`);
  }
  if (exports.list().some((served) => served.name === name)) {
    throw genericError(`NBD server already has export named '${name}'`);
  }
  const order = { id: args.id, nodeName, name, isWritable, description: args.description ?? "" };
  const view = exports.list().find((served) => served.isView && served.name === nodeName);
  const disk = context.host.disks().find((candidate) => candidate.name === nodeName);
  const place = context.targets.get(nodeName);
  if (view !== undefined) {
    if (isWritable) throw genericError("Cannot export read-only node as writable");
    exports.add({ ...order, contexts: contextsOf(args, view) });
  } else if (disk !== undefined) {
    if (isWritable && disk.readOnly) throw genericError("Cannot export read-only node as writable");
    await refuseLiveBitmaps(args, context);
    exports.add({ ...order, contexts: [] });
  } else if (place !== undefined) {
    await openAndAdd(order, place, args, { exports, host: context.host });
  } else throw genericError(`Cannot find device='' nor node-name='${nodeName}'`);
  return {};
}

async function openAndAdd(
  order: { id: string; nodeName: string; name: string; isWritable: boolean; description: string },
  place: TargetNode,
  { bitmaps = [] }: AddArguments,
  { exports, host }: { exports: ExportHost; host: JobHost },
): Promise<void> {
  if (order.isWritable && place.readOnly) throw genericError("Cannot export read-only node as writable");
  if (place.hasOtherBacking) throw notSupported("An export of a node with a 'backing'");
  const [bitmap] = bitmaps;
  if (bitmap !== undefined) {
    throw genericError(`Bitmap '${typeof bitmap === "string" ? bitmap : bitmap.name}' is not found`);
  }
  if (host.jobs().some((job) => !isOver(job.status) && job.options.target === place.path)) {
    throw genericError(`Node '${place.name}' is busy: node is used as target of a backup`);
  }
  await exports.openDisk(place.name, {
    path: place.path,
    format: place.format,
    readOnly: !order.isWritable,
  });
  exports.add({ ...order, contexts: [] });
}

/** The bitmaps of a view stand still, like its data. */
function contextsOf({ bitmaps = [] }: AddArguments, view: ServedExport): string[] {
  return bitmaps.map((bitmap) => {
    const name = typeof bitmap === "string" ? bitmap : bitmap.name;
    const context = NBD_META_DIRTY_BITMAP_PREFIX + name;
    const isOfView = typeof bitmap === "string" || bitmap.node === view.nodeName || bitmap.node === view.name;
    if (isOfView && view.contexts.includes(context)) return context;
    throw genericError(`Bitmap '${name}' is not found`);
  });
}

async function refuseLiveBitmaps(args: AddArguments, { host }: CommandContext): Promise<void> {
  for (const bitmap of args.bitmaps ?? []) {
    const wanted = typeof bitmap === "string" ? { node: args["node-name"], name: bitmap } : bitmap;
    if (!host.disks().some((disk) => disk.name === wanted.node)) {
      throw genericError(`Node '${wanted.node}' not found`);
    }
    const found = (await host.bitmaps(wanted.node)).find(({ name }) => name === wanted.name);
    if (found === undefined) {
      const isLocal = typeof bitmap === "string";
      throw genericError(
        isLocal ? `Bitmap '${bitmap}' is not found` : `Dirty bitmap '${wanted.name}' not found`,
      );
    }
    if (found.isRecording && args.writable !== true) {
      throw genericError(`Enabled bitmap '${wanted.name}' incompatible with readonly export`);
    }
    throw notSupported("A bitmap of a disk that is written (export the snapshot of a job instead)");
  }
}

function removeExport({ id, mode }: Arguments<typeof EXPORT_DEL>, context: CommandContext): JsonObject {
  const exports = hostOf(context);
  const found = exports.list().find((candidate) => candidate.id === id);
  if (found === undefined) throw genericError(`Export '${id}' is not found`);
  if (found.isShuttingDown) throw genericError(`Export '${id}' is already shutting down`);
  if (mode !== "hard" && found.clientCount > 0) throw genericError(`export '${id}' still in use`);
  const isLast = exports
    .list()
    .every(({ id: other, nodeName }) => other === id || nodeName !== found.nodeName);
  const closes = isLast && exports.isOpened(found.nodeName);
  const { host } = context;
  if (closes && host.jobs().some(({ disk, status }) => disk === found.nodeName && !isOver(status))) {
    throw genericError(`Node '${found.nodeName}' is busy: a backup of it is running`);
  }
  // As in QEMU the answer does not wait for the clients; BLOCK_EXPORT_DELETED tells.
  exports.remove(id, closes);
  return {};
}

function refuseUnsupported(args: AddArguments): void {
  if (args.type !== "nbd") throw notSupported(`An export of type '${args.type}'`);
  if (args.iothread !== undefined) throw notSupported("'iothread'");
  if (args["allocation-depth"] === true) throw notSupported("'allocation-depth'");
}

function hostOf({ exports }: CommandContext): ExportHost {
  if (exports === undefined) throw notSupported("An export at run time");
  return exports;
}

function infoOf({ id, nodeName, isShuttingDown }: ServedExport): JsonObject {
  return { id, type: "nbd", "node-name": nodeName, "shutting-down": isShuttingDown };
}

export const EXPORT_COMMANDS: Record<string, Command> = {
  "block-export-add": command(EXPORT_ADD, addExport),
  "block-export-del": command(EXPORT_DEL, removeExport),
  "nbd-server-start": {
    execute: () => {
      throw genericError("NBD server already running");
    },
  },
  "query-block-exports": command({}, (_args, { exports }) => (exports?.list() ?? []).map(infoOf)),
};
