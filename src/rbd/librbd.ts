// librados and librbd through koffi: the calls that are used here, each with its C signature. Headers: rados/librados.h and
// rbd/librbd.h of Ceph 16.2; what is used has been there since 12 (librbd 1.12), but for rbd_aio_write_zeroes (16).
//
// Loaded when it is first asked for, in the thread that asks: the libraries take some 50 ms, which the main thread of a
// server has not. Results are Ceph's own: 0 or a count, or minus errno. Pointers are BigInts, so that they can cross to
// another thread of the process, in which they mean the same.
//
// Which calls may block, and for how long: all that are not `aio…` speak to monitors or OSDs and wait for the answer; the
// settings of connect.ts bound that. The `aio…` calls only queue. Nothing here calls back into JavaScript but
// rbd_diff_iterate2, whose callback comes in the calling thread, while the call lasts (holes.ts).

import { CowcatcherError, messageOf } from "../errors.js";
import { loadKoffi, missingKoffi } from "../native/koffi.js";

type Pointer = bigint;
type Out = ArrayBufferLike;

export interface Librbd {
  radosCreate2(cluster: Out, clusterName: string, userName: string): number;
  /** @param path null: Ceph's default places */
  radosConfReadFile(cluster: Pointer, path: string | null): number;
  radosConfSet(cluster: Pointer, name: string, value: string): number;
  radosConfGet(cluster: Pointer, name: string, value: Out): number;
  radosConnect(cluster: Pointer): number;
  /** The client's number, by which watchers are told apart. */
  instanceId(cluster: Pointer): bigint;
  radosShutdown(cluster: Pointer): void;
  ioctxCreate(cluster: Pointer, pool: string, ioctx: Out): number;
  ioctxDestroy(ioctx: Pointer): void;
  ioctxSetNamespace(ioctx: Pointer, namespace: string): void;
  /** From now on writes to a full pool fail at once, rather than wait until there is room. */
  ioctxFailWhenFull(ioctx: Pointer): void;
  /** With the features, order and data pool that Ceph's configuration says. */
  create(ioctx: Pointer, name: string, sizeBytes: number): number;
  remove(ioctx: Pointer, name: string): number;
  rename(ioctx: Pointer, from: string, to: string): number;
  /** Names of the namespace's images, separated by NUL; -ERANGE with the needed size in `sizeWord`. */
  list(ioctx: Pointer, names: Out, sizeWord: Out): number;
  open(ioctx: Pointer, name: string, image: Out): number;
  openReadOnly(ioctx: Pointer, name: string, image: Out, snapshot: string | null): number;
  close(image: Pointer): number;
  /** rbd_image_info_t: size, obj_size, num_objs, order… */
  stat(image: Pointer, info: Out): number;
  features(image: Pointer, word: Out): number;
  flags(image: Pointer, word: Out): number;
  /** Fills a timespec. */
  createTime(image: Pointer, timespec: Out): number;
  resize(image: Pointer, sizeBytes: number): number;
  /** Who has the image open to write, this client included. -ERANGE beyond `max`. */
  watchers(image: Pointer, max: number): { address: string; client: bigint }[] | number;
  /** Advisory and exclusive locks. -ERANGE if there are more than fit into some KiB. */
  lockers(image: Pointer): { cookie: string; address: string }[] | number;
  lockAcquire(image: Pointer): number;
  flush(image: Pointer): number;
  snapCreate(image: Pointer, name: string): number;
  snapRemove(image: Pointer, name: string): number;
  /** `onExtent` is called in this thread before the call returns; it returns 0 to go on, -errno to end the call. */
  diffIterate(
    image: Pointer,
    lengthBytes: number,
    wholeObject: boolean,
    onExtent: (offsetBytes: number, lengthBytes: number, exists: number) => number,
  ): number;
  aioCreateCompletion(completion: Out): number;
  aioWrite(
    image: Pointer,
    offsetBytes: number,
    lengthBytes: number,
    address: number,
    completion: Pointer,
  ): number;
  aioRead(
    image: Pointer,
    offsetBytes: number,
    lengthBytes: number,
    address: Pointer,
    completion: Pointer,
  ): number;
  aioWriteZeroes(image: Pointer, offsetBytes: number, lengthBytes: number, completion: Pointer): number;
  aioIsComplete(completion: Pointer): number;
  aioReturnValue(completion: Pointer): number;
  /** At any time: an operation that goes on is not ended by it. */
  aioRelease(completion: Pointer): void;
  /** Memory that outlives the thread; 0n where there is none. */
  allocate(lengthBytes: number): Pointer;
  free(address: Pointer): void;
  /** memcpy */
  copy(target: number, source: Pointer, lengthBytes: number): void;
}

const LIBRADOS = "librados.so.2";
const LIBRBD = "librbd.so.1";
/** Space for the lists of rbd_list_lockers. */
const LOCKERS_BYTES = 4096;
/** rbd_image_watcher_t: char *addr, int64_t id, uint64_t cookie. */
const WATCHER_BYTES = 24;
/** rbd_lock_mode_t */
const RBD_LOCK_MODE_EXCLUSIVE = 0;

let loaded: Librbd | undefined;

/** @throws CowcatcherError UNSUPPORTED where a library is missing, naming what to install. */
export function librbd(): Librbd {
  loaded ??= load();
  return loaded;
}

function load(): Librbd {
  if (process.env["COWCATCHER_NO_NATIVE"] === "1" || process.platform !== "linux") {
    throw missing("native calls are off here", "RBD needs Linux, and COWCATCHER_NO_NATIVE unset");
  }
  if (missingKoffi() !== undefined) {
    throw missing(
      "native calls are missing (the package koffi cannot be loaded)",
      "install the package anew",
    );
  }
  try {
    // First, and by itself: librbd finds it loaded.
    const koffi = loadKoffi();
    return bind(koffi.load(LIBRADOS), koffi.load(LIBRBD), koffi.load("libc.so.6"));
  } catch (error) {
    throw missing(
      `Ceph's libraries cannot be loaded: ${messageOf(error)}`,
      "install librbd1 (Debian, Ubuntu: apt-get install librbd1; Fedora, RHEL: dnf install librbd1)",
    );
  }
}

function missing(problem: string, hint: string): CowcatcherError {
  return new CowcatcherError({ code: "UNSUPPORTED", object: "rbd:", problem, hint });
}

type Library = ReturnType<ReturnType<typeof loadKoffi>["load"]>;
type NativeFunction = (...args: unknown[]) => number;

function bind(rados: Library, rbd: Library, libc: Library): Librbd {
  const koffi = loadKoffi();
  const of =
    (library: Library) =>
    (prototype: string): NativeFunction =>
      library.func(prototype) as NativeFunction;
  const [inRados, inRbd, inLibc] = [of(rados), of(rbd), of(libc)];
  const DiffCallback = koffi.pointer(koffi.proto("int", ["uint64_t", "size_t", "int", "uint64_t"]));
  const create2 = inRados(
    "int rados_create2(void *cluster, const char *clusterName, const char *user, uint64_t flags)",
  );
  const confReadFile = inRados("int rados_conf_read_file(uint64_t cluster, const char *path)");
  const confSet = inRados("int rados_conf_set(uint64_t cluster, const char *name, const char *value)");
  const confGet = inRados(
    "int rados_conf_get(uint64_t cluster, const char *name, void *value, size_t bytes)",
  );
  const connect = inRados("int rados_connect(uint64_t cluster)");
  const instanceId = inRados("uint64_t rados_get_instance_id(uint64_t cluster)");
  const shutdown = inRados("void rados_shutdown(uint64_t cluster)");
  const ioctxCreate = inRados("int rados_ioctx_create(uint64_t cluster, const char *pool, void *ioctx)");
  const ioctxDestroy = inRados("void rados_ioctx_destroy(uint64_t ioctx)");
  const setNamespace = inRados("void rados_ioctx_set_namespace(uint64_t ioctx, const char *name)");
  const fullTry = inRados("void rados_set_osdmap_full_try(uint64_t ioctx)");
  const imageOptionsCreate = inRbd("void rbd_image_options_create(void *options)");
  const imageOptionsDestroy = inRbd("void rbd_image_options_destroy(uint64_t options)");
  const create4 = inRbd("int rbd_create4(uint64_t ioctx, const char *name, uint64_t size, uint64_t options)");
  const remove = inRbd("int rbd_remove(uint64_t ioctx, const char *name)");
  const rename = inRbd("int rbd_rename(uint64_t ioctx, const char *from, const char *to)");
  const list = inRbd("int rbd_list(uint64_t ioctx, void *names, void *size)");
  const open = inRbd("int rbd_open(uint64_t ioctx, const char *name, void *image, const char *snapshot)");
  const openReadOnly = inRbd(
    "int rbd_open_read_only(uint64_t ioctx, const char *name, void *image, const char *snapshot)",
  );
  const close = inRbd("int rbd_close(uint64_t image)");
  const stat = inRbd("int rbd_stat(uint64_t image, void *info, size_t bytes)");
  const getFeatures = inRbd("int rbd_get_features(uint64_t image, void *features)");
  const getFlags = inRbd("int rbd_get_flags(uint64_t image, void *flags)");
  const createTime = inRbd("int rbd_get_create_timestamp(uint64_t image, void *timespec)");
  const resize = inRbd("int rbd_resize(uint64_t image, uint64_t size)");
  const watchersList = inRbd("int rbd_watchers_list(uint64_t image, void *watchers, void *count)");
  const watchersCleanup = inRbd("void rbd_watchers_list_cleanup(void *watchers, size_t count)");
  const listLockers = inRbd(
    "int64_t rbd_list_lockers(uint64_t image, void *exclusive, void *tag, void *tagBytes, void *clients, " +
      "void *clientsBytes, void *cookies, void *cookiesBytes, void *addresses, void *addressesBytes)",
  );
  const lockAcquire = inRbd("int rbd_lock_acquire(uint64_t image, int mode)");
  const flush = inRbd("int rbd_flush(uint64_t image)");
  const snapCreate = inRbd("int rbd_snap_create(uint64_t image, const char *name)");
  const snapRemove = inRbd("int rbd_snap_remove(uint64_t image, const char *name)");
  // Image, from which snapshot, offset, length, with the parent, by whole objects, callback, its argument.
  const diffIterate2 = rbd.func("rbd_diff_iterate2", "int", [
    "uint64_t",
    "const char *",
    "uint64_t",
    "uint64_t",
    "uint8_t",
    "uint8_t",
    DiffCallback,
    "uint64_t",
  ]) as NativeFunction;
  const aioCreate = inRbd("int rbd_aio_create_completion(uint64_t arg, uint64_t callback, void *completion)");
  const aioWrite = inRbd(
    "int rbd_aio_write(uint64_t image, uint64_t offset, size_t length, uint64_t buffer, uint64_t completion)",
  );
  const aioRead = inRbd(
    "int rbd_aio_read(uint64_t image, uint64_t offset, size_t length, uint64_t buffer, uint64_t completion)",
  );
  const aioWriteZeroes = inRbd(
    "int rbd_aio_write_zeroes(uint64_t image, uint64_t offset, size_t length, uint64_t completion, " +
      "int zeroFlags, int operationFlags)",
  );
  const aioIsComplete = inRbd("int rbd_aio_is_complete(uint64_t completion)");
  const aioReturnValue = inRbd("int64_t rbd_aio_get_return_value(uint64_t completion)");
  const aioRelease = inRbd("void rbd_aio_release(uint64_t completion)");
  const malloc = inLibc("uint64_t malloc(size_t bytes)") as unknown as (bytes: number) => number | bigint;
  const freeMemory = inLibc("void free(uint64_t address)");
  const memcpy = inLibc("uint64_t memcpy(uint64_t target, uint64_t source, size_t bytes)");
  const bytesOf = (out: Out): Uint8Array => new Uint8Array(out);

  return {
    radosCreate2: (cluster, name, user) => create2(bytesOf(cluster), name, user, 0),
    radosConfReadFile: (cluster, path) => confReadFile(cluster, path),
    radosConfSet: (cluster, name, value) => confSet(cluster, name, value),
    radosConfGet: (cluster, name, value) => confGet(cluster, name, bytesOf(value), value.byteLength),
    radosConnect: (cluster) => connect(cluster),
    instanceId: (cluster) => BigInt(instanceId(cluster)),
    radosShutdown: (cluster) => void shutdown(cluster),
    ioctxCreate: (cluster, pool, ioctx) => ioctxCreate(cluster, pool, bytesOf(ioctx)),
    ioctxDestroy: (ioctx) => void ioctxDestroy(ioctx),
    ioctxSetNamespace: (ioctx, namespace) => void setNamespace(ioctx, namespace),
    ioctxFailWhenFull: (ioctx) => void fullTry(ioctx),
    create(ioctx, name, sizeBytes) {
      const options = new BigUint64Array(new ArrayBuffer(8));
      imageOptionsCreate(bytesOf(options.buffer));
      try {
        return create4(ioctx, name, sizeBytes, options[0]);
      } finally {
        imageOptionsDestroy(options[0]);
      }
    },
    remove: (ioctx, name) => remove(ioctx, name),
    rename: (ioctx, from, to) => rename(ioctx, from, to),
    list: (ioctx, names, sizeWord) => list(ioctx, bytesOf(names), bytesOf(sizeWord)),
    open: (ioctx, name, image) => open(ioctx, name, bytesOf(image), null),
    openReadOnly: (ioctx, name, image, snapshot) => openReadOnly(ioctx, name, bytesOf(image), snapshot),
    close: (image) => close(image),
    stat: (image, info) => stat(image, bytesOf(info), info.byteLength),
    features: (image, word) => getFeatures(image, bytesOf(word)),
    flags: (image, word) => getFlags(image, bytesOf(word)),
    createTime: (image, timespec) => createTime(image, bytesOf(timespec)),
    resize: (image, sizeBytes) => resize(image, sizeBytes),
    watchers(image, max) {
      const found = new Uint8Array(new ArrayBuffer(max * WATCHER_BYTES));
      const count = new BigUint64Array([BigInt(max)]);
      const result = watchersList(image, found, bytesOf(count.buffer));
      if (result < 0) return result;
      const listed = Number(count[0]);
      const view = new DataView(found.buffer);
      const watchers = Array.from({ length: listed }, (_, index) => ({
        address: String(koffi.decode(found, index * WATCHER_BYTES, "const char *")),
        client: view.getBigInt64(index * WATCHER_BYTES + 8, true),
      }));
      watchersCleanup(found, listed);
      return watchers;
    },
    lockers(image) {
      const [tag, clients, cookies, addresses] = Array.from(
        { length: 4 },
        () => new Uint8Array(new ArrayBuffer(LOCKERS_BYTES)),
      );
      const [tagSize, clientsSize, cookiesSize, addressesSize] = Array.from({ length: 4 }, () =>
        bytesOf(new BigUint64Array([BigInt(LOCKERS_BYTES)]).buffer),
      );
      const exclusive = new Uint8Array(new ArrayBuffer(4));
      const count = listLockers(
        image, exclusive, tag, tagSize, clients, clientsSize, cookies, cookiesSize, addresses, addressesSize,
      ); // prettier-ignore
      if (count < 0) return Number(count);
      const [cookieTexts, addressTexts] = [cookies, addresses].map((list) => textsOf(list, Number(count)));
      return Array.from({ length: Number(count) }, (_, index) => ({
        cookie: cookieTexts?.[index] ?? "",
        address: addressTexts?.[index] ?? "",
      }));
    },
    lockAcquire: (image) => lockAcquire(image, RBD_LOCK_MODE_EXCLUSIVE),
    flush: (image) => flush(image),
    snapCreate: (image, name) => snapCreate(image, name),
    snapRemove: (image, name) => snapRemove(image, name),
    diffIterate(image, lengthBytes, wholeObject, onExtent) {
      const callback = koffi.register(
        (offset: number | bigint, length: number | bigint, exists: number) =>
          onExtent(Number(offset), Number(length), exists),
        DiffCallback,
      );
      try {
        return diffIterate2(image, null, 0, lengthBytes, 1, wholeObject ? 1 : 0, callback, 0);
      } finally {
        koffi.unregister(callback);
      }
    },
    aioCreateCompletion: (completion) => aioCreate(0, 0, bytesOf(completion)),
    aioWrite: (image, offset, length, address, completion) =>
      aioWrite(image, offset, length, address, completion),
    aioRead: (image, offset, length, address, completion) =>
      aioRead(image, offset, length, address, completion),
    aioWriteZeroes: (image, offset, length, completion) =>
      aioWriteZeroes(image, offset, length, completion, 0, 0),
    aioIsComplete: (completion) => aioIsComplete(completion),
    aioReturnValue: (completion) => Number(aioReturnValue(completion)),
    aioRelease: (completion) => void aioRelease(completion),
    allocate: (lengthBytes) => BigInt(malloc(lengthBytes)),
    free: (address) => void freeMemory(address),
    copy: (target, source, lengthBytes) => void memcpy(target, source, lengthBytes),
  };
}

/** The first `count` of texts that NUL separates. */
function textsOf(bytes: Uint8Array | undefined, count: number): string[] {
  return new TextDecoder().decode(bytes).split("\0").slice(0, count);
}
