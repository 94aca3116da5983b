// From an address to an opened image, and back: every call here waits for Ceph, so all of it runs in a thread of its own
// (keeper-thread.ts), never on the main thread.
//
// Time limits. By default librados waits for monitors for five minutes and for OSDs for ever. Here a call has the limits
// below, unless the configuration or the address says otherwise; then it fails with -ETIMEDOUT, and what failed is tried
// again by whoever may (--target-retries). A request that timed out may still reach its OSD later: that is no harm to a
// backup, which writes each byte once, and with the exclusive lock, which the writer takes and keeps, a client that
// was left behind is shut out before the next one writes.
//
// Caching is off: what an operation answers is then the OSDs' own answer, with its offset, and a backup's whole objects
// gain nothing by a copy more. Writes hand librbd a copy of the data (rbd_disable_zero_copy_writes), so that a buffer
// belongs to its worker again as soon as it has left, whatever becomes of the write.

import { accessSync, constants } from "node:fs";
import { CowcatcherError, ioError } from "../errors.js";
import { filesOfAddress, imageSpec, type RbdAddress } from "./address.js";
import { rbdError } from "./errors.js";
import type { Librbd } from "./librbd.js";

/** Ceph's setting, its own default, and what stands in its place where nobody has set another. */
const TIME_LIMITS = [
  { name: "client_mount_timeout", cephDefault: 300, seconds: 30 },
  { name: "rados_mon_op_timeout", cephDefault: 0, seconds: 30 },
  { name: "rados_osd_op_timeout", cephDefault: 0, seconds: 30 },
] as const;
/** A default of ours that the configuration and the address may change. */
const SETTINGS = [
  ["rbd_cache", "false"],
  // Of the log that Ceph keeps in memory and prints when it aborts; and nothing of it on our stderr.
  ["log_to_stderr", "false"],
  ["err_to_stderr", "false"],
] as const;
/** Not to be changed: see above. */
const FIXED_SETTINGS = [["rbd_disable_zero_copy_writes", "true"]] as const;
const SETTING_BYTES = 256;

const FEATURE_EXCLUSIVE_LOCK = 1n << 2n;
const FEATURE_FAST_DIFF = 1n << 4n;
const FEATURE_MIGRATING = 1n << 9n;
const FEATURE_NON_PRIMARY = 1n << 10n;
/** rbd_get_flags: the object map, or what fast-diff makes of it, is not to be trusted. */
const FLAGS_INVALID = 3n;
/** rbd_image_info_t; its last members are not used. */
const IMAGE_INFO_BYTES = 256;
const MAX_WATCHERS = 16;
const EEXIST = -17;
const ENOENT = -2;
const ERANGE = -34;

export interface ImageFacts {
  sizeBytes: number;
  objectBytes: number;
  /** Holes by whole objects are known from the object map, without a question to each object. */
  hasFastDiff: boolean;
  hasExclusiveLock: boolean;
}

export interface Cluster {
  readonly address: RbdAddress;
  readonly ioctx: bigint;
  /** This client's number among an image's watchers. */
  readonly client: bigint;
  close(): void;
}

/** @throws CowcatcherError NOT_FOUND or IO for a file that the address names and that cannot be read. */
export function checkAddressFiles(address: RbdAddress): void {
  for (const [setting, path] of filesOfAddress(address)) {
    try {
      accessSync(path, constants.R_OK);
    } catch (error) {
      throw ioError(`read the file that '${setting}=' names`, path, error);
    }
  }
}

/**
 * @param name what errors call it
 * @throws CowcatcherError IO for a user that Ceph does not let in, for monitors that do not answer, a setting that there is
 *   not; NOT_FOUND for a pool or namespace that there is not.
 */
export function openCluster(native: Librbd, address: RbdAddress, name: string): Cluster {
  checkAddressFiles(address);
  const word = new BigUint64Array(new ArrayBuffer(8));
  const { pool, user = "admin" } = address;
  check(native.radosCreate2(word.buffer, "ceph", `client.${user}`), "set up a client of Ceph's", name);
  const cluster = word[0] ?? 0n;
  let ioctx: bigint | undefined;
  const close = (): void => {
    if (ioctx !== undefined) native.ioctxDestroy(ioctx);
    native.radosShutdown(cluster);
  };
  try {
    configure(native, cluster, address, name);
    connect(native, cluster, address, name);
    const result = native.ioctxCreate(cluster, pool, word.buffer);
    if (result === ENOENT) throw notFound(name, `there is no pool '${pool}'`, "see `ceph osd pool ls`");
    check(result, `open the pool '${pool}'`, name);
    ioctx = word[0] ?? 0n;
    if (address.namespace !== "") native.ioctxSetNamespace(ioctx, address.namespace);
    native.ioctxFailWhenFull(ioctx);
    return { address, ioctx, client: native.instanceId(cluster), close };
  } catch (error) {
    close();
    throw error;
  }
}

function configure(native: Librbd, cluster: bigint, address: RbdAddress, name: string): void {
  const { conf, settings } = address;
  for (const [setting, value] of SETTINGS) native.radosConfSet(cluster, setting, value);
  const result = native.radosConfReadFile(cluster, conf ?? null);
  // Without a file in the default places monitors and keyring may be in the address.
  if (conf !== undefined || result !== ENOENT)
    check(result, `read the configuration ${conf ?? "of Ceph"}`, name);
  else if (!settings.some(([setting]) => setting === "mon_host")) {
    throw notFound(
      name,
      "Ceph has no configuration in its usual places",
      "give conf=FILE, or mon_host=… and keyring=FILE",
    );
  }
  for (const { name: setting, cephDefault, seconds } of TIME_LIMITS) {
    if (numberSetting(native, cluster, setting) === cephDefault) {
      native.radosConfSet(cluster, setting, String(seconds));
    }
  }
  for (const [setting, value] of settings) {
    if (native.radosConfSet(cluster, setting, value) < 0) {
      throw new CowcatcherError({
        code: "USAGE",
        object: name,
        problem: `Ceph has no setting '${setting}' that takes '${value}'`,
        hint: "see `ceph config help`",
      });
    }
  }
  for (const [setting, value] of FIXED_SETTINGS) native.radosConfSet(cluster, setting, value);
}

function numberSetting(native: Librbd, cluster: bigint, setting: string): number {
  const value = new Uint8Array(new ArrayBuffer(SETTING_BYTES));
  if (native.radosConfGet(cluster, setting, value.buffer) < 0) return NaN;
  return Number(new TextDecoder().decode(value.subarray(0, value.indexOf(0))));
}

function connect(native: Librbd, cluster: bigint, address: RbdAddress, name: string): void {
  const who = `client.${address.user ?? "admin"}`;
  const denied = {
    problem: `Ceph does not let ${who} in`,
    hint: "see `ceph auth ls`; name another user with id=, its key with keyring=FILE",
  };
  const problem = "no monitor of Ceph's answered in time";
  const noMonitors = { problem, hint: "see mon_host in ceph.conf, and whether the monitors run" };
  const result = native.radosConnect(cluster);
  if (result >= 0) return;
  throw rbdError("connect to Ceph", name, result, undefined, {
    EACCES: denied,
    EPERM: denied,
    ENOENT: {
      problem: `there is no configuration or no key of ${who}`,
      hint: "give conf=FILE, and keyring=FILE or its place in ceph.conf",
    },
    EINVAL: { problem: "the configuration names no monitors, or a wrong key", hint: "see ceph.conf" },
    ETIMEDOUT: noMonitors,
    ECONNREFUSED: noMonitors,
  });
}

/** @throws CowcatcherError EXISTS, and as rbdError. */
export function createImage(
  native: Librbd,
  { ioctx }: Cluster,
  image: string,
  sizeBytes: number,
  name: string,
): void {
  const result = native.create(ioctx, image, sizeBytes);
  check(result, "make the image", name);
}

/**
 * @param image its name in the pool, which for an unfinished one is not the address's
 * @throws CowcatcherError NOT_FOUND without such an image or snapshot, and as rbdError.
 */
export function openImage(
  native: Librbd,
  cluster: Cluster,
  image: string,
  write: boolean,
  name: string,
): bigint {
  const { ioctx, address } = cluster;
  const { snapshot } = address;
  const word = new BigUint64Array(new ArrayBuffer(8));
  const result = write
    ? native.open(ioctx, image, word.buffer)
    : native.openReadOnly(ioctx, image, word.buffer, snapshot ?? null);
  if (result === ENOENT) {
    const spec = imageSpec({ ...address, image });
    throw notFound(name, `there is no image '${spec}'`, "see `rbd ls` and `rbd snap ls`");
  }
  check(result, "open the image", name);
  return word[0] ?? 0n;
}

/** @throws CowcatcherError UNSUPPORTED for an image that is being migrated, and as rbdError. */
export function examineImage(native: Librbd, image: bigint, name: string): ImageFacts {
  const info = new BigUint64Array(new ArrayBuffer(IMAGE_INFO_BYTES));
  const word = new BigUint64Array(new ArrayBuffer(8));
  check(native.stat(image, info.buffer), "examine the image", name);
  check(native.features(image, word.buffer), "examine the image", name);
  const features = word[0] ?? 0n;
  if ((features & FEATURE_MIGRATING) !== 0n) {
    throw new CowcatcherError({
      code: "UNSUPPORTED",
      object: name,
      problem: "the image is being migrated",
      hint: "wait for `rbd migration commit`, or abort the migration",
    });
  }
  check(native.flags(image, word.buffer), "examine the image", name);
  const flags = word[0] ?? 0n;
  return {
    sizeBytes: Number(info[0]),
    objectBytes: Number(info[1]),
    hasFastDiff: (features & FEATURE_FAST_DIFF) !== 0n && (flags & FLAGS_INVALID) === 0n,
    hasExclusiveLock: (features & FEATURE_EXCLUSIVE_LOCK) !== 0n,
  };
}

/** @throws CowcatcherError LOCKED while another client has the image open to write, or holds a lock of its own. */
export function refuseUsedImage(
  native: Librbd,
  { client }: Cluster,
  image: bigint,
  name: string,
  hint: string,
): void {
  const watchers = native.watchers(image, MAX_WATCHERS);
  if (typeof watchers === "number" && watchers !== ERANGE) check(watchers, "ask who uses the image", name);
  const others = typeof watchers === "number" ? [] : watchers.filter((watcher) => watcher.client !== client);
  const other = typeof watchers === "number" ? `more than ${MAX_WATCHERS}` : others[0]?.address;
  if (other !== undefined) throw inUse(name, `another client has the image open (${other})`, hint);
  const lockers = native.lockers(image);
  if (typeof lockers === "number") return check(lockers, "ask who has locked the image", name);
  // A lock of librbd's own whose holder is gone is broken by whoever takes it next.
  const locker = lockers.find(({ cookie }) => !cookie.startsWith("auto "));
  if (locker === undefined) return;
  throw inUse(
    name,
    `the image is locked ('${locker.cookie}' of ${locker.address})`,
    "see `rbd lock ls`; remove a lock that is left over with `rbd lock rm`",
  );
}

/** For good: librbd does not hand it to another client. @throws CowcatcherError as rbdError. */
export function lockImage(native: Librbd, image: bigint, name: string): void {
  check(native.lockAcquire(image), "lock the image", name);
}

/** @throws CowcatcherError UNSUPPORTED for a mirror's copy. */
export function refuseMirrorCopy(native: Librbd, image: bigint, name: string): void {
  const word = new BigUint64Array(new ArrayBuffer(8));
  check(native.features(image, word.buffer), "examine the image", name);
  if (((word[0] ?? 0n) & FEATURE_NON_PRIMARY) === 0n) return;
  throw new CowcatcherError({
    code: "UNSUPPORTED",
    object: name,
    problem: "the image is a mirror's copy, which only the mirror writes",
    hint: "write to the primary image, or to another",
  });
}

/** Names of the namespace's images. @throws CowcatcherError as rbdError. */
export function listImages(native: Librbd, { ioctx }: Cluster, name: string): string[] {
  const size = new BigUint64Array([64n * 1024n]);
  for (;;) {
    const names = new Uint8Array(new ArrayBuffer(Number(size[0])));
    const result = native.list(ioctx, names.buffer, size.buffer);
    if (result === ERANGE) continue;
    check(result, "list the pool's images", name);
    return new TextDecoder()
      .decode(names.subarray(0, result))
      .split("\0")
      .filter((text) => text !== "");
  }
}

export function check(result: number, action: string, name: string): void {
  if (result >= 0) return;
  if (result === EEXIST) {
    throw new CowcatcherError({
      code: "EXISTS",
      object: name,
      problem: `cannot ${action}: there is one of that name already`,
      errno: "EEXIST",
    });
  }
  throw rbdError(action, name, result);
}

function notFound(object: string, problem: string, hint: string): CowcatcherError {
  return new CowcatcherError({ code: "NOT_FOUND", object, problem, hint, errno: "ENOENT" });
}

function inUse(object: string, problem: string, hint: string): CowcatcherError {
  return new CowcatcherError({ code: "LOCKED", object, problem, hint });
}
