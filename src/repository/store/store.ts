// What a repository needs of the place that holds it: six calls, and a barrier. A folder (folder-store.ts) and an S3
// bucket (s3-store.ts) have them; the same black-box tests run over both.
//
//   put     an object that is not there yet; never a part of it under its name
//   get     an object, or a range of it
//   head    whether it is there, how large, changed when
//   list    the names that begin with a prefix
//   delete  an object; one that is not there is deleted already
//   touch   an object anew, with a new time: the sign of life of whoever is at work
//   flush   the barrier: what was put before is stable, its name included
//
// What the claims (work/claims.ts) rest on, and a store must keep:
//  - A call that has been answered has happened: every later `get`, `head` and `list`, by whomever, shows it.
//  - A `list` shows every object that was there before it began and has not been deleted since. Of those that come
//    or go meanwhile it may show any.
//  - Times are of one clock, the store's own. They are compared with each other, never with the caller's clock, and
//    nothing but the judgement who is dead depends on them.
//
// Any thread; an opened store belongs to the thread that opened it.

import { CowcatcherError } from "../../errors.js";

export interface ObjectInfo {
  sizeBytes: number;
  /** When it was put or touched last, by the store's clock, in milliseconds since 1970. */
  changedMs: number;
}

export interface ListedObject {
  name: string;
  /** Only with `details`; -1 otherwise. */
  sizeBytes: number;
}

export interface ListOptions {
  /** Of which names the size is wanted; of others it may be told, too. Asked more than once, and to answer the same. */
  details: (name: string) => boolean;
}

/** `present`: something stood under the name already, and still does. */
export type PutOutcome = "stored" | "present";

export interface PutOptions {
  /**
   * After the next flush() it survives a loss of power (true), or it need only be seen by others (false), as what tells
   * that its writer lives. In a bucket all is durable.
   */
  durable: boolean;
  /**
   * Of two that put one name at the same time one learns that it came second. Without it the later of two equal
   * contents may replace the earlier one.
   */
  exclusive?: boolean | undefined;
}

export interface ByteRange {
  offsetBytes: number;
  lengthBytes: number;
}

export interface GetOptions {
  range?: ByteRange | undefined;
  /**
   * Of maxBytes: where the object may be put, so that what is returned is a part of it. New memory costs a page fault
   * each 4 KiB. Not for another call until that of this one is used.
   */
  memory?: Buffer | undefined;
}

export interface Store {
  /** What errors call it: the address that the user gave. */
  readonly name: string;
  /** @throws CowcatcherError NO_SPACE, IO; nothing stands under the name then that was not there before. */
  put(name: string, content: Uint8Array, options: PutOptions): Promise<PutOutcome>;
  /** A range past the object's end is cut short. @throws CowcatcherError NOT_FOUND, IO, LIMIT (over maxBytes). */
  get(name: string, maxBytes: number, options?: GetOptions): Promise<Buffer>;
  head(name: string): Promise<ObjectInfo | undefined>;
  /** In batches, in any order. @param prefix of whole names: "a/b" has "a/bc" and "a/b/c" */
  list(prefix: string, options?: ListOptions): AsyncIterable<ListedObject[]>;
  delete(name: string): Promise<void>;
  touch(name: string, content: Uint8Array): Promise<void>;
  /** @param prefix of a folder ("a/b/"): what others put in it before is stable then, too */
  flush(prefix?: string): Promise<void>;
  /** Removes what writers that were killed have left and no `list` shows. Returns how many. */
  removeLitter(): Promise<number>;
  close(): void;
}

/** How a worker opens the store for itself: plain data. Of a bucket it holds the secret key. */
export type StoreDescription = FolderStoreDescription | S3StoreDescription;

export interface FolderStoreDescription {
  kind: "folder";
  name: string;
  path: string;
}

export interface S3StoreDescription {
  kind: "s3";
  name: string;
  /** Scheme, host and port. */
  endpoint: string;
  bucket: string;
  /** "" or "a/b/", before every name. */
  prefix: string;
  region: string;
  /** The bucket is the first part of the path, or of the host's name. */
  style: "path" | "virtual-host";
  accessKeyId: string;
  secretAccessKey: string;
  sessionToken: string | undefined;
}

const MAX_NAME_BYTES = 512;
const SEGMENT = /^[A-Za-z0-9][A-Za-z0-9._:+=@-]{0,199}$/;

/** Names are made here alone, of parts that were checked; one that is not like them would leave its folder. */
export function checkObjectName(name: string): void {
  if (name.length <= MAX_NAME_BYTES && name.split("/").every((segment) => SEGMENT.test(segment))) return;
  throw new CowcatcherError({ code: "INTERNAL", object: name, problem: "is no name of an object" });
}

/** All names with the prefix, where they are known to be few. @throws CowcatcherError LIMIT over `max` */
export async function listNames(store: Store, prefix: string, max: number): Promise<string[]> {
  const names: string[] = [];
  for await (const batch of store.list(prefix)) {
    for (const { name } of batch) names.push(name);
    if (names.length <= max) continue;
    throw new CowcatcherError({
      code: "LIMIT",
      object: store.name,
      problem: `there are more than ${max} objects under ${prefix}`,
    });
  }
  return names;
}

export function notFoundError(storeName: string, name: string, cause?: unknown): CowcatcherError {
  return new CowcatcherError({
    code: "NOT_FOUND",
    object: storeName,
    problem: `the object ${name} is missing`,
    errno: "ENOENT",
    cause,
  });
}

export function isNotFound(error: unknown): boolean {
  return error instanceof CowcatcherError && error.code === "NOT_FOUND";
}

export function tooLargeError(storeName: string, name: string, maxBytes: number): CowcatcherError {
  return new CowcatcherError({
    code: "LIMIT",
    object: storeName,
    problem: `the object ${name} is larger than ${maxBytes} bytes`,
    hint: "it is not what this program has written",
  });
}
