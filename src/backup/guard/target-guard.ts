// What a target must not be: a disk that is being copied or served, anything that such a disk is built on, or whatever
// lies below or above one of these, under whatever name.
//
// Two storages are looked at: that of the images, on the thread that has them (`partsInUse`), and that of the target and
// its backing file, on the thread that has the target. What the one finds crosses to the other as plain data.
//
// The image locks refuse most of it, but not everywhere: there are file systems without them, systems without libc,
// second device nodes, and NBD. A target that got through would be the end of the disk: a file is renamed over it, a
// device or an export is overwritten with what is old by then. So each open file of each image, and of its backing
// chain, is compared with the target by what it is (block/file/storage.ts), and each export by where it is (nbd/wire/place.ts).
//
// A target may well be built on the file that the source is built on. But what a guest writes to, or what is behind
// this server's own exports, changes under a target that is built on it: `refuseChangingBacking`.

import { basename, dirname } from "node:path";
import { absoluteName } from "../../file-names.js";
import { CowcatcherError } from "../../errors.js";
import type { Image } from "../../block/device.js";
import { realPath } from "../../block/file/calls.js";
import { overlap, type Storage, storageAt, storageOfFd } from "../../block/file/storage.js";
import {
  haveCommon,
  listenerKeys,
  type NbdPlace,
  type ResolvedExport,
  resolveExport,
  sameExport,
} from "../../nbd/wire/place.js";
import { isNbdUri, parseNbdUri } from "../../nbd/wire/uri.js";
import { isRbdAddress, mayBeSameImage, parseRbdAddress, type RbdAddress } from "../../rbd/address.js";
import { NULL_TARGET_PATH } from "../../target/null.js";
import { STDOUT_FD, STDOUT_TARGET_PATH } from "../../target/stdout.js";

export interface ImageInUse {
  image: Image;
  /** The disk of this very copy; otherwise one that this process serves besides. */
  isSource: boolean;
}

/** What this process has open, and offers. */
export interface InUse {
  images: readonly ImageInUse[];
  /** Where it serves exports. */
  listeners: readonly NbdPlace[];
}

/** One file or export of an image, and what it is to it. */
interface Part {
  name: string;
  /** 0: the image itself. */
  depth: number;
  isDataFile: boolean;
  /** Null for an export. */
  storage: Storage | null;
}

/** InUse as plain data. */
export interface InUseParts {
  images: readonly { path: string; readOnly: boolean; isSource: boolean; parts: readonly Part[] }[];
  listeners: readonly NbdPlace[];
}

export const NOTHING_IN_USE: InUseParts = { images: [], listeners: [] };

/** On the thread that has the images. */
export async function partsInUse({ images, listeners }: InUse): Promise<InUseParts> {
  const described = images.map(async ({ image, isSource }) => {
    const { path, readOnly } = image;
    return { path, readOnly, isSource, parts: await partsOf(image) };
  });
  return { images: await Promise.all(described), listeners };
}

/** Where a target is, so that two that are one can be told. */
export type TargetPlace =
  | { kind: "export"; address: ResolvedExport }
  | { kind: "rbd"; address: RbdAddress }
  | { kind: "device"; storage: Storage }
  | { kind: "file"; name: string };

/** Null for `null:`, and for what cannot be a target: making it says why. */
export async function placeOf(target: string): Promise<TargetPlace | null> {
  if (target === NULL_TARGET_PATH) return null;
  if (isNbdUri(target)) return { kind: "export", address: await resolveExport(parseNbdUri(target)) };
  if (isRbdAddress(target)) return { kind: "rbd", address: parseRbdAddress(target) };
  const storage = await storageAt(target);
  if (storage?.isBlockDevice === true) return { kind: "device", storage };
  const path = await realPath(target).catch(() => absoluteName(target));
  const folder = await storageAt(dirname(path));
  return folder === null ? null : { kind: "file", name: `${folder.id}/${basename(path)}` };
}

/**
 * @throws CowcatcherError USAGE, naming the target and what it would destroy; as parseNbdUri.
 */
export async function refuseImageAsTarget(target: string, inUse: InUseParts): Promise<void> {
  if (target === NULL_TARGET_PATH) return;
  if (isNbdUri(target)) return refuseExport(target, inUse);
  if (isRbdAddress(target)) return refuseRbdImage(target, inUse);
  const storage = target === STDOUT_TARGET_PATH ? await storageOfFd(STDOUT_FD) : await storageAt(target);
  if (storage === null) return;
  for (const image of inUse.images) {
    for (const part of image.parts) {
      if (part.storage === null || !overlap(storage, part.storage)) continue;
      throw refusal(target, roleOf(part, image), relation(target, storage, part.name, part.storage));
    }
  }
}

/**
 * The same for files that another program has open, known by their paths.
 * @throws CowcatcherError USAGE, naming the target and what it would destroy
 */
export async function refuseFileAsTarget(target: string, paths: readonly string[]): Promise<void> {
  if (target === NULL_TARGET_PATH || isNbdUri(target)) return;
  const storage = await storageAt(target);
  if (storage === null) return;
  for (const path of paths) {
    const part = await storageAt(path);
    if (part === null || !overlap(storage, part)) continue;
    throw refusal(target, "is in use by the guest", relation(target, storage, path, part));
  }
}

async function refuseExport(target: string, inUse: InUseParts): Promise<void> {
  const place = await resolveExport(parseNbdUri(target));
  for (const image of inUse.images) {
    for (const part of image.parts) {
      if (part.storage !== null) continue;
      const sameness = sameExport(place, await resolveExport(parseNbdUri(part.name)));
      if (sameness === "no") continue;
      if (sameness === "perhaps") throw perhapsSame(target, part.name);
      const name = part.name === target ? "" : `: it is the export '${part.name}'`;
      throw refusal(target, roleOf(part, image), name);
    }
  }
  if (await isOwnServer(place.keys, inUse)) {
    throw refusal(target, "is an export of this very server", "");
  }
}

/** A snapshot of an image is no other than it. No layer but the last can be an RBD image. */
function refuseRbdImage(target: string, inUse: InUseParts): void {
  const address = parseRbdAddress(target);
  for (const image of inUse.images) {
    if (!isRbdAddress(image.path) || !mayBeSameImage(address, parseRbdAddress(image.path))) continue;
    const name = image.path === target ? "" : `: it is '${image.path}', in this cluster or another`;
    throw refusal(target, roleOf({ name: "", depth: 0, isDataFile: false, storage: null }, image), name);
  }
}

/**
 * Refuses a target's backing file that changes while, or after, the target is made.
 * @param backing the opened chain below the target
 * @throws CowcatcherError USAGE
 */
export async function refuseChangingBacking(
  target: string,
  backing: Image,
  inUse: InUseParts,
): Promise<void> {
  for (const part of await partsOf(backing)) {
    const writer = await writerOf(part, inUse);
    if (writer !== null) throw changingBacking(target, part.name, writer);
  }
}

/** Whether the path is, by any name, the image of the disk that is backed up: the image itself, nothing below it. */
export async function isSourceImage(path: string, { images }: InUseParts): Promise<boolean> {
  const storage = await storageAt(path);
  if (storage === null) return false;
  return images.some(({ isSource, parts }) => {
    const own = parts.find(({ depth, isDataFile }) => depth === 0 && !isDataFile)?.storage ?? null;
    return isSource && own?.id === storage.id;
  });
}

/** The same for a file by its path, before it is opened: the lock of our own server would call it another program's. */
export async function refuseChangingBackingFile(
  target: string,
  backingPath: string,
  inUse: InUseParts,
): Promise<void> {
  const storage = await storageAt(backingPath);
  const writer = storage === null ? null : fileWriterOf(storage, inUse);
  if (writer !== null) throw changingBacking(target, backingPath, writer);
}

/** @throws CowcatcherError USAGE for a target that would replace a file that it is to be built on. */
export async function refuseBackingAsTarget(target: string, backing: Image): Promise<void> {
  const storage = await storageAt(target);
  if (storage === null) return;
  for (const part of await partsOf(backing)) {
    if (part.storage === null || !overlap(storage, part.storage)) continue;
    const role =
      part.depth === 0 && !part.isDataFile ? "is its own backing file" : "is in its own backing chain";
    throw refusal(target, role, relation(target, storage, part.name, part.storage));
  }
}

async function partsOf(image: Image): Promise<Part[]> {
  const parts: Part[] = [];
  let depth = 0;
  for (let layer: Image | null = image; layer !== null; layer = layer.backing) {
    if (isNbdUri(layer.path)) parts.push({ name: layer.path, depth, isDataFile: false, storage: null });
    for (const [index, { name, fd }] of layer.files.entries()) {
      parts.push({ name, depth, isDataFile: index > 0, storage: await storageOfFd(fd) });
    }
    depth++;
  }
  return parts;
}

/** The image through which the part may be written, if there is one: the path of it. */
async function writerOf(part: Part, inUse: InUseParts): Promise<string | null> {
  if (part.storage !== null) return fileWriterOf(part.storage, inUse);
  const place = await resolveExport(parseNbdUri(part.name));
  if (await isOwnServer(place.keys, inUse)) return part.name;
  for (const { path, readOnly } of inUse.images) {
    if (readOnly || !isNbdUri(path)) continue;
    if (sameExport(place, await resolveExport(parseNbdUri(path))) !== "no") return path;
  }
  return null;
}

function fileWriterOf(storage: Storage, inUse: InUseParts): string | null {
  for (const { path, readOnly, parts } of inUse.images) {
    if (readOnly) continue;
    // What lies below the image itself is open read-only.
    const own = parts.filter(({ depth }) => depth === 0);
    if (own.some((part) => part.storage !== null && overlap(storage, part.storage))) return path;
  }
  return null;
}

async function isOwnServer(keys: ReadonlySet<string>, { listeners }: InUseParts): Promise<boolean> {
  for (const listener of listeners) if (haveCommon(keys, await listenerKeys(listener))) return true;
  return false;
}

function roleOf({ depth, isDataFile }: Part, image: { path: string; isSource: boolean }): string {
  const { path, isSource } = image;
  const whose = isSource ? "the source" : `'${path}', which is served here`;
  if (depth > 0) return `is in the backing chain of ${whose}`;
  if (isDataFile) return `is the data file of ${whose}`;
  return isSource ? "is source and target at once" : "is the disk of a guest that is served here";
}

/** How the two are connected, where their names do not say it. */
function relation(target: string, storage: Storage, name: string, part: Storage): string {
  if (storage.below.has(part.id)) return `: it lies on '${name}'`;
  if (part.below.has(storage.id)) return `: '${name}' lies on it`;
  return name === target ? "" : `: it is '${name}' by another name`;
}

function refusal(target: string, role: string, connection: string): CowcatcherError {
  return new CowcatcherError({
    code: "USAGE",
    object: target,
    problem: `${role}${connection}`,
    hint: "choose another target",
  });
}

function perhapsSame(target: string, uri: string): CowcatcherError {
  return new CowcatcherError({
    code: "USAGE",
    object: target,
    problem: `may be '${uri}', which is in use here: one of the two is the server's default export`,
    hint: "name both exports in their URIs",
  });
}

function changingBacking(target: string, backing: string, writer: string): CowcatcherError {
  const by = writer === backing ? "" : `, being part of '${writer}'`;
  return new CowcatcherError({
    code: "USAGE",
    object: target,
    problem: `its backing file '${backing}' is served here and a guest may write it${by}: the backup would change with it`,
    hint: "name a backing file that nobody writes, such as an earlier backup",
  });
}
