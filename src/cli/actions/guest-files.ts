// `ls`, `cat`, `cp`: files of the guest's file systems, out of a backup or an image, by libguestfs (guestfish.ts), which
// reads it through a server of this process.
import { existsSync, mkdtempSync, readdirSync, rmSync, statSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import type { Image } from "../../block/device.js";
import { DiskNode } from "../../cow/disk-node.js";
import { CowcatcherError } from "../../errors.js";
import { absoluteName, decodeName, printableName, systemName } from "../../file-names.js";
import { listenUnix } from "../../nbd/server/listen.js";
import { NbdServer } from "../../nbd/server/server.js";
import { openAnyImage } from "../../repository/open.js";
import { type KeyFlags, lazyKey } from "../options/repository-options.js";
import { usageError } from "../options/options.js";
import { type CommandContext, printJsonDocument, printLine } from "../output/context.js";
import { EXIT } from "../output/exit-codes.js";
import { onInterrupt } from "../signals.js";
import { Guestfish } from "./guestfish.js";
import { ServedExports } from "./served-exports.js";

const EXPORT = "disk";
const MAX_CONNECTIONS = 8;
/** Before the number of the process whose folder it is. */
const FOLDER_PREFIX = "cowcatcher-files-";

export interface GuestFileFlags extends KeyFlags {
  /** libguestfs's name of a file system: /dev/sda1, /dev/vg/root. */
  filesystem?: string;
}

/** One line of `ls`. */
interface Entry {
  name: string;
  type: "file" | "directory" | "symlink" | "block" | "character" | "fifo" | "socket";
  /** As in stat(2), the type's bits not included. */
  mode: number;
  uid: number;
  gid: number;
  sizeBytes: number;
  modified: Date;
}

/** @throws CowcatcherError, which the program reports. */
export function runLs(
  backup: string,
  path: string,
  flags: GuestFileFlags & { long?: boolean },
  context: CommandContext,
): Promise<number> {
  return withGuestfish(backup, flags, context, async (guestfish) => {
    const { output } = context;
    const folder = guestPath(path);
    const isFolder = (await guestfish.ask("is-dir", folder))[0] === "true";
    const names = isFolder ? await guestfish.names("ls0", folder) : [Buffer.from(folder)];
    const known = names.map(decodeName).sort();
    if (!output.json && flags.long !== true && isFolder) {
      for (const name of known) printLine(output, name);
      return;
    }
    const entries: Entry[] = [];
    for (const name of known)
      entries.push(await entryOf(guestfish, isFolder ? join(folder, name) : name, name));
    if (output.json) printJsonDocument(output, { path: folder, entries: entries.map(jsonOf) });
    else if (flags.long === true) for (const entry of entries) printLine(output, longLine(entry));
    else for (const { name } of entries) printLine(output, name);
  });
}

/** Contents go to standard output, and nothing else. @throws CowcatcherError, which the program reports. */
export function runCat(
  backup: string,
  paths: readonly string[],
  flags: GuestFileFlags,
  context: CommandContext,
): Promise<number> {
  return withGuestfish(backup, flags, context, async (guestfish) => {
    for await (const part of guestfish.download(paths.map(guestPath))) {
      if (!process.stdout.write(part)) await new Promise((resolve) => process.stdout.once("drain", resolve));
    }
  });
}

/** @param names in the guest, then a folder or, for one file, a name here. @throws CowcatcherError */
export function runCp(
  backup: string,
  names: readonly string[],
  flags: GuestFileFlags,
  context: CommandContext,
): Promise<number> {
  const target = absoluteName(names.at(-1) ?? "");
  const paths = names.slice(0, -1).map(guestPath);
  const isFolder = statSync(systemName(target), { throwIfNoEntry: false })?.isDirectory() === true;
  if (!isFolder && paths.length > 1) throw usageError(target, "is no folder", "make it first");
  return withGuestfish(backup, flags, context, async (guestfish) => {
    // It has no way to say what "/" would be called here.
    if (isFolder) await guestfish.ask("copy-out", ...paths, target);
    else await guestfish.ask("download", paths[0] ?? "", target);
    const { output } = context;
    const copied = isFolder ? paths.map((path) => join(target, basename(path))) : [target];
    if (output.json) printJsonDocument(output, { copied: copied.map(printableName) });
  });
}

/** As libguestfs has it: from the root, whatever the user wrote before it. */
function guestPath(path: string): string {
  return join("/", path);
}

/** Runs `use` with the guest's file systems mounted, read-only, and ends everything whatever comes. */
async function withGuestfish(
  backup: string,
  flags: GuestFileFlags,
  context: CommandContext,
  use: (guestfish: Guestfish) => Promise<void>,
): Promise<number> {
  const image = await openAnyImage(backup, { readOnly: true, repositoryKey: lazyKey(flags) });
  removeLitter();
  const folder = mkdtempSync(join(tmpdir(), `${FOLDER_PREFIX}${process.pid}-`));
  const removeFolder = (): void => rmSync(folder, { recursive: true, force: true });
  let guestfish: Guestfish | undefined;
  let server: Closeable | undefined;
  const removeHandlers = onInterrupt(context, {
    onFirst: () => guestfish?.end(),
    onSecond: removeFolder,
  });
  try {
    const socket = join(folder, "nbd");
    server = await serveDisk(image, socket, context);
    guestfish = new Guestfish(`nbd:///${EXPORT}?socket=${socket}`);
    await guestfish.ask("run");
    // It has opened the disk, and nothing is to stay behind whatever becomes of this process.
    removeFolder();
    await mountFileSystems(guestfish, backup, flags.filesystem);
    await use(guestfish);
    return EXIT.done;
  } finally {
    removeHandlers();
    await guestfish?.end();
    await server?.close();
    await image.close();
    removeFolder();
  }
}

/** Of commands that were killed while their disk was being opened. */
function removeLitter(): void {
  for (const name of readdirSync(tmpdir())) {
    const pid = new RegExp(`^${FOLDER_PREFIX}(\\d+)-`).exec(name)?.[1];
    if (pid === undefined || existsSync(`/proc/${pid}`)) continue;
    try {
      rmSync(join(tmpdir(), name), { recursive: true, force: true });
    } catch {
      // Another user's.
    }
  }
}

interface Closeable {
  close(): Promise<void>;
}

async function serveDisk(image: Image, socket: string, { logger }: CommandContext): Promise<Closeable> {
  const exports = new ServedExports(new Map([[EXPORT, new DiskNode(EXPORT, image, null)]]));
  const server = new NbdServer({ exports: exports.byName, maxConnections: MAX_CONNECTIONS, logger });
  exports.attach(server);
  const listener = await listenUnix(socket, { mode: 0o600 });
  listener.serve(server);
  return {
    async close() {
      await listener.close();
      await server.close();
    },
  };
}

/** As the guest mounts them where it has a system of its own; else the only file system there is. */
async function mountFileSystems(
  guestfish: Guestfish,
  backup: string,
  wanted: string | undefined,
): Promise<void> {
  if (wanted !== undefined) {
    await guestfish.ask("mount-ro", wanted, "/");
    return;
  }
  const [root] = await guestfish.ask("inspect-os");
  if (root !== undefined) {
    const points = pairsOf(await guestfish.ask("inspect-get-mountpoints", root));
    points.sort(([a], [b]) => a.length - b.length);
    for (const [point, device] of points) {
      try {
        await guestfish.ask("mount-ro", device, point);
      } catch (error) {
        // Without /boot there is still the rest: libguestfs's own tools go on as well.
        if (point === "/") throw error;
      }
    }
    return;
  }
  const found = pairsOf(await guestfish.ask("list-filesystems")).filter(
    ([, type]) => !["swap", "unknown", ""].includes(type),
  );
  const [only, ...others] = found;
  if (only !== undefined && others.length === 0) {
    await guestfish.ask("mount-ro", only[0], "/");
    return;
  }
  const names = found.map(([device, type]) => `${device} (${type})`).join(", ");
  throw new CowcatcherError({
    code: only === undefined ? "UNSUPPORTED" : "USAGE",
    object: backup,
    problem: only === undefined ? "there is no file system on it that libguestfs knows" : `has ${names}`,
    ...(only === undefined ? {} : { hint: "say which one: --filesystem" }),
  });
}

/** Of lines "KEY: VALUE". */
function pairsOf(lines: readonly string[]): [string, string][] {
  return lines.map((line) => {
    const at = line.indexOf(": ");
    return at < 0 ? [line, ""] : [line.slice(0, at), line.slice(at + 2)];
  });
}

const TYPES: Record<number, Entry["type"]> = {
  0o010000: "fifo",
  0o020000: "character",
  0o040000: "directory",
  0o060000: "block",
  0o100000: "file",
  0o120000: "symlink",
  0o140000: "socket",
};
const TYPE_BITS = 0o170000;

async function entryOf(guestfish: Guestfish, path: string, name: string): Promise<Entry> {
  const fields = new Map(pairsOf(await guestfish.ask("lstatns", path)));
  const field = (key: string): number => Number(fields.get(key));
  const mode = field("st_mode");
  return {
    name,
    type: TYPES[mode & TYPE_BITS] ?? "file",
    mode: mode & ~TYPE_BITS,
    uid: field("st_uid"),
    gid: field("st_gid"),
    sizeBytes: field("st_size"),
    modified: new Date(field("st_mtime_sec") * 1000),
  };
}

function jsonOf({ name, type, mode, uid, gid, sizeBytes, modified }: Entry): object {
  return {
    name: printableName(name),
    type,
    mode: mode.toString(8).padStart(4, "0"),
    uid,
    gid,
    size_bytes: sizeBytes,
    modified: modified.toISOString(),
  };
}

const TYPE_LETTERS: Record<Entry["type"], string> = {
  file: "-",
  directory: "d",
  symlink: "l",
  block: "b",
  character: "c",
  fifo: "p",
  socket: "s",
};

/** As ls -ln has it, with times in UTC. */
function longLine({ name, type, mode, uid, gid, sizeBytes, modified }: Entry): string {
  const letters = [6, 3, 0].map((shift) => {
    const bits = mode >> shift;
    return `${bits & 4 ? "r" : "-"}${bits & 2 ? "w" : "-"}${bits & 1 ? "x" : "-"}`;
  });
  const time = modified.toISOString().replace("T", " ").slice(0, 19);
  const numbers = `${String(uid).padStart(5)} ${String(gid).padStart(5)} ${String(sizeBytes).padStart(12)}`;
  return `${TYPE_LETTERS[type]}${letters.join("")} ${numbers} ${time} ${name}`;
}
