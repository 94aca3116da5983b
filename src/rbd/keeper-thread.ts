// The keeper of one open image: the thread that makes every call of librbd's that waits for Ceph. It opens and closes,
// makes snapshots, renames; the workers' reads and writes it has no part in (io.ts). One request after another; while
// Ceph does not answer the thread hangs, and nobody else does.
//
// A target that is not there is made under a name of its own, `.IMAGE.cowcatcher-RANDOM`, and gets its final name when it is
// complete: whoever lists the pool's images never finds half a backup under the name of a whole one. What a killed process
// has left of that kind the next job for the same image removes: it has no watcher, and is not of this minute.
//
//   open-target ─► new: made, opened, locked │ there, with force: nobody has it open; opened, locked, grown
//   flush ─► commit: snapshot, close, rename, COMMITTED │ release: close, remove what is unfinished
//
// Whether a cancel came in time is decided in one word that both sides change by compare-exchange (door.ts): a commit that
// finds CANCELLED at its end undoes what it has done.

import { randomBytes } from "node:crypto";
import { CowcatcherError, toCowcatcherError } from "../errors.js";
import { libc } from "../native/libc.js";
import {
  check,
  type Cluster,
  createImage,
  examineImage,
  type ImageFacts,
  listImages,
  lockImage,
  openCluster,
  openImage,
  refuseMirrorCopy,
  refuseUsedImage,
} from "./connect.js";
import { Door, PHASE_COMMITTED } from "./door.js";
import { gatherHoles } from "./holes.js";
import type { KeeperReply, KeeperRequest, OpenedImage } from "./keeper-protocol.js";
import { type Librbd, librbd } from "./librbd.js";

type OpenTarget = Extract<KeeperRequest, { kind: "open-target" }>;
type OpenSource = Extract<KeeperRequest, { kind: "open-source" }>;

/** Workers leave within moments; one that has not by then never will. */
const LEAVE_LIMIT_MS = 10_000;
const TEMPORARY_INFIX = ".cowcatcher-";
const RANDOM_BYTES = 6;
/** Of the final name in the temporary one: librbd's names may have 96 characters in all its fields. */
const PREFIX_LENGTH = 60;
/** A process that was killed is a watcher for half a minute still. */
const STALE_AFTER_S = 60;
/** Of one job; the rest is the next one's. */
const MAX_STALE_REMOVED = 8;
const READ_HINT = "give a snapshot of it, IMAGE@SNAP, made with `rbd snap create`";
const WRITE_HINT = "end what uses it; a client that died is forgotten after 30 s";

/** The image that the keeper has open. */
interface Session {
  native: Librbd;
  cluster: Cluster;
  name: string;
  door: Door;
  /** Undefined: closed. */
  image: bigint | undefined;
  facts: ImageFacts;
  /** The name under which an unfinished image stands; undefined for one that was there before. */
  temporary: string | undefined;
  /** A snapshot that was made, and must go again if the target is not committed. */
  snapshot: string | undefined;
}

export class Keeper {
  #session: Session | undefined;

  /** Blocks the thread until Ceph has answered. Never throws. */
  handle(request: KeeperRequest): KeeperReply {
    try {
      return { kind: "done", ...this.#answer(request) };
    } catch (error) {
      const typed = toCowcatcherError(error, "rbd:");
      return { kind: "failed", error: typed.toDetails(), stack: typed.stack };
    }
  }

  #answer(request: KeeperRequest): Omit<Extract<KeeperReply, { kind: "done" }>, "kind"> {
    switch (request.kind) {
      case "open-target":
        // Before the cluster is: Linux gives a new thread the niceness of the one that makes it.
        libc?.setThreadNice(request.niceness);
        return { opened: this.#open(request, (cluster) => openTarget(cluster, request)) };
      case "open-source":
        return { opened: this.#open(request, (cluster) => openSource(cluster, request)) };
      case "holes": {
        const { native, image, facts, name } = this.#current();
        return { holes: gatherHoles(native, image, facts, name) };
      }
      case "flush": {
        const { native, image, name } = this.#current();
        check(native.flush(image), "flush", name);
        return {};
      }
      case "commit":
        commit(this.#current(), request.snapshot);
        return {};
      case "release": {
        const session = this.#session;
        this.#session = undefined;
        if (session !== undefined) release(session);
        return {};
      }
    }
  }

  #open(request: OpenTarget | OpenSource, open: (cluster: Cluster) => Opened): OpenedImage {
    const native = librbd();
    const { name } = request;
    const cluster = openCluster(native, request.address, name);
    try {
      const { image, facts, temporary } = open(cluster);
      const door = new Door(request.door);
      this.#session = { native, cluster, name, door, image, facts, temporary, snapshot: undefined };
      const { sizeBytes, objectBytes, hasFastDiff } = facts;
      return { image, sizeBytes, objectBytes, hasFastDiff, isNew: temporary !== undefined };
    } catch (error) {
      cluster.close();
      throw error;
    }
  }

  #current(): Session & { image: bigint } {
    const session = this.#session;
    if (session?.image === undefined) throw new Error("the keeper has no image open");
    return session as Session & { image: bigint };
  }
}

interface Opened {
  image: bigint;
  facts: ImageFacts;
  temporary: string | undefined;
}

function openSource(cluster: Cluster, { address, name, lock }: OpenSource): Opened {
  const native = librbd();
  const image = openImage(native, cluster, address.image, false, name);
  return closingOnError(native, image, () => {
    const facts = examineImage(native, image, name);
    // A snapshot never changes.
    if (lock && address.snapshot === undefined) refuseUsedImage(native, cluster, image, name, READ_HINT);
    return { image, facts, temporary: undefined };
  });
}

function openTarget(cluster: Cluster, request: OpenTarget): Opened {
  const native = librbd();
  const { address, name, force } = request;
  if (!isThere(native, cluster, address.image, name)) return makeImage(native, cluster, request);
  if (!force) {
    throw new CowcatcherError({
      code: "EXISTS",
      object: name,
      problem: "the image exists already",
      hint: "give another name, or --force to write it in place",
    });
  }
  return openExisting(native, cluster, request);
}

/** Looks without becoming a watcher. @throws CowcatcherError as openImage but NOT_FOUND. */
function isThere(native: Librbd, cluster: Cluster, image: string, name: string): boolean {
  try {
    native.close(openImage(native, cluster, image, false, name));
    return true;
  } catch (error) {
    if (error instanceof CowcatcherError && error.code === "NOT_FOUND") return false;
    throw error;
  }
}

function makeImage(native: Librbd, cluster: Cluster, { address, name, sizeBytes }: OpenTarget): Opened {
  const prefix = `.${address.image.slice(0, PREFIX_LENGTH)}${TEMPORARY_INFIX}`;
  removeStale(native, cluster, prefix, name);
  const temporary = `${prefix}${randomBytes(RANDOM_BYTES).toString("hex")}`;
  createImage(native, cluster, temporary, sizeBytes, name);
  try {
    const image = openImage(native, cluster, temporary, true, name);
    return closingOnError(native, image, () => {
      const facts = examineImage(native, image, name);
      if (facts.hasExclusiveLock) lockImage(native, image, name);
      return { image, facts, temporary };
    });
  } catch (error) {
    native.remove(cluster.ioctx, temporary);
    throw error;
  }
}

function openExisting(native: Librbd, cluster: Cluster, request: OpenTarget): Opened {
  const { address, name, sizeBytes, snapshot } = request;
  if (snapshot !== undefined) refuseSnapshot(native, cluster, address.image, snapshot, name);
  const image = openImage(native, cluster, address.image, true, name);
  return closingOnError(native, image, () => {
    refuseMirrorCopy(native, image, name);
    refuseUsedImage(native, cluster, image, name, WRITE_HINT);
    let facts = examineImage(native, image, name);
    if (facts.hasExclusiveLock) lockImage(native, image, name);
    if (facts.sizeBytes < sizeBytes) {
      check(native.resize(image, sizeBytes), "grow the image to the disk's size", name);
      facts = { ...facts, sizeBytes };
    }
    return { image, facts, temporary: undefined };
  });
}

/** Said now, and not after hours of copying. */
function refuseSnapshot(
  native: Librbd,
  cluster: Cluster,
  image: string,
  snapshot: string,
  name: string,
): void {
  const word = new BigUint64Array(new ArrayBuffer(8));
  if (native.openReadOnly(cluster.ioctx, image, word.buffer, snapshot) < 0) return;
  native.close(word[0] ?? 0n);
  throw new CowcatcherError({
    code: "EXISTS",
    object: name,
    problem: `the image has a snapshot '${snapshot}' already`,
    hint: "give another name to --target-snapshot",
  });
}

/** Whatever cannot be removed stays: it is not this job's business. */
function removeStale(native: Librbd, cluster: Cluster, prefix: string, name: string): void {
  const stale = listImages(native, cluster, name).filter(
    (image) => image.startsWith(prefix) && image.length === prefix.length + 2 * RANDOM_BYTES,
  );
  for (const image of stale.slice(0, MAX_STALE_REMOVED)) {
    if (isLeftOver(native, cluster, image)) native.remove(cluster.ioctx, image);
  }
}

function isLeftOver(native: Librbd, { ioctx }: Cluster, image: string): boolean {
  const word = new BigUint64Array(new ArrayBuffer(8));
  if (native.openReadOnly(ioctx, image, word.buffer, null) < 0) return false;
  const handle = word[0] ?? 0n;
  try {
    const watchers = native.watchers(handle, 1);
    if (typeof watchers === "number" || watchers.length > 0) return false;
    // rbd_get_create_timestamp fills a timespec: seconds, nanoseconds.
    const timespec = new BigInt64Array(new ArrayBuffer(16));
    if (native.createTime(handle, timespec.buffer) < 0) return false;
    return Date.now() / 1000 - Number(timespec[0]) > STALE_AFTER_S;
  } finally {
    native.close(handle);
  }
}

function closingOnError<T>(native: Librbd, image: bigint, work: () => T): T {
  try {
    return work();
  } catch (error) {
    native.close(image);
    throw error;
  }
}

function commit(session: Session & { image: bigint }, snapshot: string | undefined): void {
  const { native, cluster, name, door, temporary } = session;
  if (snapshot !== undefined) {
    check(native.snapCreate(session.image, snapshot), `make the snapshot '${snapshot}'`, name);
    session.snapshot = snapshot;
  }
  if (door.isCancelled) throw cancelled(name);
  if (temporary !== undefined) {
    // Still open, and locked: nobody comes in between. librbd renames by a handle of its own.
    check(native.rename(cluster.ioctx, temporary, cluster.address.image), "give the image its name", name);
    session.temporary = cluster.address.image;
  }
  if (!door.decide(PHASE_COMMITTED)) throw cancelled(name);
  session.temporary = undefined;
  session.snapshot = undefined;
  closeImage(session);
}

function release(session: Session): void {
  const { native, cluster, temporary, snapshot, name } = session;
  let problem: unknown;
  if (session.image !== undefined && snapshot !== undefined) native.snapRemove(session.image, snapshot);
  const isClosed = session.image === undefined || closeImage(session);
  // With its handle open the cluster's connection is needed, and the image is in use.
  if (!isClosed) return;
  if (temporary !== undefined) {
    const result = native.remove(cluster.ioctx, temporary);
    if (result < 0) problem = result;
  }
  cluster.close();
  if (typeof problem === "number") check(problem, `remove the unfinished image '${temporary}'`, name);
}

/** False: a thread is inside for good, and the handle stays open. */
function closeImage(session: Session): boolean {
  const { native, image, door } = session;
  if (image === undefined) return true;
  if (!door.shut(LEAVE_LIMIT_MS)) return false;
  session.image = undefined;
  native.close(image);
  for (const buffer of door.takeOrphans()) native.free(buffer);
  return true;
}

function cancelled(object: string): CowcatcherError {
  return new CowcatcherError({ code: "CANCELLED", object, problem: "the backup was cancelled" });
}
