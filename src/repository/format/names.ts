// Where things stand in a repository, and what groups, disks and times may be called: they become parts of paths.

import { CowcatcherError } from "../../errors.js";
import { ID_BYTES } from "./secrets.js";

export const CONFIG_NAME = "config";
export const KEYS_PREFIX = "keys/";
export const CHUNKS_PREFIX = "chunks/";
export const GROUPS_PREFIX = "groups/";
export const LOCKS_PREFIX = "locks/";
export const CLAIMS_PREFIX = "claims/";
/** Chunks that `repo verify` found damaged, for whoever wants to look at them. */
export const DAMAGED_PREFIX = "damaged/";
export const MANIFEST = "manifest";
export const PROTECTED = "protected";
export const VERIFIED = "verified";
const INDEX_SUFFIX = ".index";

/** Letters, digits and . _ + - with a letter or digit first; 1 to 100 of them. */
const WORD = /^[A-Za-z0-9][A-Za-z0-9._+-]{0,99}$/;
/** A backup's time: UTC, to the nanosecond. */
const TIME = /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z$/;

export interface BackupName {
  group: string;
  time: string;
}

/** @throws CowcatcherError USAGE. */
export function checkGroup(group: string): string {
  return checkWord(group, "group");
}

/** @throws CowcatcherError USAGE. */
export function checkDisk(disk: string): string {
  return checkWord(disk, "disk");
}

function checkWord(word: string, kind: string): string {
  if (WORD.test(word)) return word;
  throw new CowcatcherError({
    code: "USAGE",
    object: word,
    problem: `is no name of a ${kind}`,
    hint: "give 1 to 100 letters, digits, dots, underscores, plus and minus signs, with a letter or digit first",
  });
}

export function isBackupTime(text: string): boolean {
  return TIME.test(text);
}

/** Nanoseconds since 1970, as a backup is called. */
export function backupTime(ns: bigint): string {
  const seconds = new Date(Number(ns / 1_000_000_000n) * 1000).toISOString().slice(0, 19);
  return `${seconds}.${(ns % 1_000_000_000n).toString().padStart(9, "0")}Z`;
}

/** Nanoseconds since 1970 of a backup's time. */
export function backupTimeNs(time: string): bigint {
  return BigInt(Date.parse(`${time.slice(0, 19)}Z`)) * 1_000_000n + BigInt(time.slice(20, 29));
}

/** Milliseconds since 1970 of a backup's time. */
export function backupTimeMs(time: string): number {
  return Date.parse(`${time.slice(0, 23)}Z`);
}

export function backupFolder({ group, time }: BackupName): string {
  return `${GROUPS_PREFIX}${group}/${time}/`;
}

export function manifestName(backup: BackupName): string {
  return backupFolder(backup) + MANIFEST;
}

export function indexName(backup: BackupName, disk: string): string {
  return `${backupFolder(backup)}${disk}${INDEX_SUFFIX}`;
}

/** What stands under groups/, by its name: undefined for what no program of ours has put there. */
export function parseBackupObject(name: string): (BackupName & { object: string }) | undefined {
  const [root, group = "", time = "", object = "", ...rest] = name.split("/");
  if (root !== "groups" || rest.length > 0 || !WORD.test(group) || !TIME.test(time)) return undefined;
  return { group, time, object };
}

/** A chunk's generation: 0, unless its name was condemned when it was stored again (work/claims.ts). */
export type Generation = number;
export const MAX_GENERATION = 255;

export function chunkName(id: Uint8Array, generation: Generation = 0): string {
  const hex = Buffer.from(id.buffer, id.byteOffset, id.length).toString("hex");
  return chunkNameOfHex(hex, generation);
}

export function chunkNameOfHex(hex: string, generation: Generation): string {
  return `${CHUNKS_PREFIX}${hex.slice(0, 2)}/${hex}${generation === 0 ? "" : `.${generation}`}`;
}

const CHUNK_OBJECT = /^chunks\/([0-9a-f]{2})\/(\1[0-9a-f]{62})(?:\.([1-9]\d{0,2}))?$/;

export function parseChunkName(name: string): { id: Buffer; generation: Generation } | undefined {
  const match = CHUNK_OBJECT.exec(name);
  const generation = Number(match?.[3] ?? 0);
  if (match?.[2] === undefined || generation > MAX_GENERATION) return undefined;
  return { id: Buffer.from(match[2], "hex"), generation };
}

export function isHole(ids: Uint8Array, index: number): boolean {
  const at = index * ID_BYTES;
  for (let i = at; i < at + ID_BYTES; i++) if (ids[i] !== 0) return false;
  return true;
}
