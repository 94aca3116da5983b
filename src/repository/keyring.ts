// The keys of an opened repository: which of them a passphrase or a key file is, one more, one less.

import { hostname, userInfo } from "node:os";
import { CowcatcherError } from "../errors.js";
import type { RepositoryConfig } from "./format/config.js";
import { keyError } from "./format/errors.js";
import {
  type KeySource,
  MAX_KEY_OBJECT_BYTES,
  MAX_KEYS,
  parseKey,
  unwrapMaster,
  type WrappedKey,
  wrapMaster,
} from "./format/keys.js";
import { KEYS_PREFIX } from "./format/names.js";
import { Secrets } from "./format/secrets.js";
import { listNames, type Store } from "./store/store.js";

/** Those of this repository. */
export async function readKeys(store: Store, repositoryId: string): Promise<WrappedKey[]> {
  const keys: WrappedKey[] = [];
  for (const name of await listNames(store, KEYS_PREFIX, MAX_KEYS * 4)) {
    try {
      const key = parseKey(store.name, name, await store.get(name, MAX_KEY_OBJECT_BYTES));
      if (key.repository === repositoryId) keys.push(key);
    } catch (error) {
      // Removed since it was listed; one that is damaged must not keep the others from opening.
      if (!(error instanceof CowcatcherError) || (error.code !== "NOT_FOUND" && error.code !== "FORMAT"))
        throw error;
    }
  }
  return keys;
}

export async function openMaster(
  store: Store,
  { id }: RepositoryConfig,
  source: KeySource,
): Promise<{ secrets: Secrets; id: string }> {
  for (const key of await readKeys(store, id)) {
    const master = await unwrapMaster(key, source, id);
    if (master !== null) return { secrets: new Secrets({ repositoryId: id, master }), id: key.id };
  }
  const what = source.kind === "file" ? `the key file ${source.path}` : "the passphrase";
  throw keyError(store.name, `${what} does not open this repository`, "give the one that it was made with");
}

export function keyComment(): string {
  try {
    return `${userInfo().username}@${hostname()}`;
  } catch {
    return hostname();
  }
}

/** See Repository.addKey. */
export async function addKey(
  store: Store,
  repositoryId: string,
  { description: { master } }: Secrets,
  source: KeySource,
): Promise<string> {
  if (master === null) {
    throw keyError(store.name, "the repository is not encrypted", "make an encrypted one with repo init");
  }
  if ((await readKeys(store, repositoryId)).length >= MAX_KEYS) {
    throw new CowcatcherError({
      code: "LIMIT",
      object: store.name,
      problem: `it has ${MAX_KEYS} keys already`,
    });
  }
  const { name, id, object } = await wrapMaster(master, source, repositoryId, keyComment());
  await store.put(name, object, { durable: true });
  await store.flush();
  return id;
}

/** See Repository.removeKey. */
export async function removeKey(store: Store, repositoryId: string, id: string): Promise<void> {
  const keys = await readKeys(store, repositoryId);
  if (!keys.some((key) => key.id === id)) {
    throw new CowcatcherError({ code: "NOT_FOUND", object: id, problem: "the repository has no such key" });
  }
  if (keys.length === 1) throw lastKeyError(id);
  const name = KEYS_PREFIX + id;
  const object = await store.get(name, MAX_KEY_OBJECT_BYTES);
  await store.delete(name);
  // Two that each remove another's last companion both put theirs back.
  const isLast = (await readKeys(store, repositoryId)).length === 0;
  if (isLast) await store.put(name, object, { durable: true });
  await store.flush();
  if (isLast) throw lastKeyError(id);
}

function lastKeyError(id: string): CowcatcherError {
  return new CowcatcherError({
    code: "USAGE",
    object: id,
    problem: "is the only key, and without one nothing can be read any more",
    hint: "add another one first",
  });
}
