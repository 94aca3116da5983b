// What a target must not be: a disk that is being copied or served, anything that such a disk is built on, or whatever
// lies below or above one of these, under whatever name. Main thread.
//
// The image locks refuse most of it, but not everywhere: there are file systems without them, systems without libc,
// second device nodes, and NBD. A target that got through would be the end of the disk: a file is renamed over it, a
// device or an export is overwritten with what is old by then. So each open file of each image, and of its backing
// chain, is compared with the target by what it is (block/file/storage.ts), and each export by where it is (nbd/wire/place.ts).
//
// A target may well be built on the file that the source is built on. But what a guest writes to, or what is behind
// this server's own exports, changes under a target that is built on it: `refuseChangingBacking`.

import { CowcatcherError } from "../../errors.js";
import type { Image } from "../../block/device.js";
import { overlap, type Storage, storageAt, storageOfFd } from "../../block/file/storage.js";
import { haveCommon, listenerKeys, type NbdPlace, resolveExport, sameExport } from "../../nbd/wire/place.js";
import { isNbdUri, parseNbdUri } from "../../nbd/wire/uri.js";
import { isRbdAddress, mayBeSameImage, parseRbdAddress } from "../../rbd/address.js";
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
  storage: Storage | null;
}

/**
 * @throws CowcatcherError USAGE, naming the target and what it would destroy; as parseNbdUri.
 */
export async function refuseImageAsTarget(target: string, inUse: InUse): Promise<void> {
  if (target === NULL_TARGET_PATH) return;
  if (isNbdUri(target)) return refuseExport(target, inUse);
  if (isRbdAddress(target)) return refuseRbdImage(target, inUse);
  const storage = target === STDOUT_TARGET_PATH ? await storageOfFd(STDOUT_FD) : await storageAt(target);
  if (storage === null) return;
  for (const { image, isSource } of inUse.images) {
    for (const part of await partsOf(image)) {
      if (part.storage === null || !overlap(storage, part.storage)) continue;
      throw refusal(
        target,
        roleOf(part, image, isSource),
        relation(target, storage, part.name, part.storage),
      );
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

async function refuseExport(target: string, inUse: InUse): Promise<void> {
  const place = await resolveExport(parseNbdUri(target));
  for (const { image, isSource } of inUse.images) {
    for (const part of await partsOf(image)) {
      if (part.storage !== null) continue;
      const sameness = sameExport(place, await resolveExport(parseNbdUri(part.name)));
      if (sameness === "no") continue;
      if (sameness === "perhaps") throw perhapsSame(target, part.name);
      const name = part.name === target ? "" : `: it is the export '${part.name}'`;
      throw refusal(target, roleOf(part, image, isSource), name);
    }
  }
  if (await isOwnServer(place.keys, inUse)) {
    throw refusal(target, "is an export of this very server", "");
  }
}

/** A snapshot of an image is no other than it. No layer but the last can be an RBD image. */
function refuseRbdImage(target: string, inUse: InUse): void {
  const address = parseRbdAddress(target);
  for (const { image, isSource } of inUse.images) {
    if (!isRbdAddress(image.path) || !mayBeSameImage(address, parseRbdAddress(image.path))) continue;
    const name = image.path === target ? "" : `: it is '${image.path}', in this cluster or another`;
    throw refusal(
      target,
      roleOf({ name: "", depth: 0, isDataFile: false, storage: null }, image, isSource),
      name,
    );
  }
}

/**
 * Refuses a target's backing file that changes while, or after, the target is made.
 * @param backing the opened chain below the target
 * @throws CowcatcherError USAGE
 */
export async function refuseChangingBacking(target: string, backing: Image, inUse: InUse): Promise<void> {
  for (const part of await partsOf(backing)) {
    const writer = await writerOf(part, inUse);
    if (writer !== null) throw changingBacking(target, part.name, writer);
  }
}

/** The same for a file by its path, before it is opened: the lock of our own server would call it another program's. */
export async function refuseChangingBackingFile(
  target: string,
  backingPath: string,
  inUse: InUse,
): Promise<void> {
  const storage = await storageAt(backingPath);
  const writer = storage === null ? null : await fileWriterOf(storage, inUse);
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
async function writerOf(part: Part, inUse: InUse): Promise<string | null> {
  if (part.storage !== null) return fileWriterOf(part.storage, inUse);
  const place = await resolveExport(parseNbdUri(part.name));
  if (await isOwnServer(place.keys, inUse)) return part.name;
  for (const { image } of inUse.images) {
    if (image.readOnly || !isNbdUri(image.path)) continue;
    if (sameExport(place, await resolveExport(parseNbdUri(image.path))) !== "no") return image.path;
  }
  return null;
}

async function fileWriterOf(storage: Storage, inUse: InUse): Promise<string | null> {
  for (const { image } of inUse.images) {
    if (image.readOnly) continue;
    // What lies below the image itself is open read-only.
    for (const { fd } of image.files) if (overlap(storage, await storageOfFd(fd))) return image.path;
  }
  return null;
}

async function isOwnServer(keys: ReadonlySet<string>, { listeners }: InUse): Promise<boolean> {
  for (const listener of listeners) if (haveCommon(keys, await listenerKeys(listener))) return true;
  return false;
}

function roleOf({ depth, isDataFile }: Part, image: Image, isSource: boolean): string {
  const whose = isSource ? "the source" : `'${image.path}', which is served here`;
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
