// The manifest of a backup, which makes it exist: JSON, sealed as metadata, written last.

import { CowcatcherError } from "../../errors.js";
import { damagedError } from "./errors.js";
import type { BackupName } from "./names.js";

export const MAX_MANIFEST_BYTES = 16 * 1024 * 1024;
const VERSION = 1;

export type BackupLevel = "full" | "incremental";

export interface ManifestDisk {
  name: string;
  size_bytes: number;
  /** Of the index's content, in hexadecimal: an index of another backup does not pass for it. */
  index_sha256: string;
  chunk_count: number;
  /** Chunks that are no holes. */
  data_chunk_count: number;
  /** Chunks that this backup was the first to store, and what they take in the store. */
  new_chunk_count: number;
  new_bytes: number;
  /** Bytes of the disk that were read for it. */
  read_bytes: number;
  format: string;
}

export interface Manifest {
  version: typeof VERSION;
  group: string;
  /** T0, UTC. */
  time: string;
  /** The run that wrote it (work/runs.ts): void where that one was declared dead. */
  run: string;
  finished: string;
  level: BackupLevel;
  level_reason: string;
  /** Time of the backup whose chunks this one took over; it is not needed to read this one. */
  parent: string | null;
  checkpoint: string | null;
  /** What the clock said at T0, where that was before the group's last backup, which `time` follows; else null. */
  clock: string | null;
  disks: ManifestDisk[];
  /** What --vm-config gave. */
  vm_config: string | null;
  host: string;
  tool: string;
}

export function encodeManifest(manifest: Manifest): Buffer {
  return Buffer.from(JSON.stringify(manifest));
}

/** @throws CowcatcherError FORMAT; UNSUPPORTED for one of a later version. */
export function decodeManifest(
  storeName: string,
  name: string,
  content: Buffer,
  expected: BackupName,
): Manifest {
  const fail = (problem: string): never => {
    throw damagedError(storeName, name, problem);
  };
  let json: unknown;
  try {
    json = JSON.parse(content.toString("utf8"));
  } catch {
    fail("it is not JSON");
  }
  const manifest = json as Partial<Manifest> | null;
  if (typeof manifest !== "object" || manifest === null) return fail("it is no object");
  if (manifest.version !== VERSION) {
    throw new CowcatcherError({
      code: "UNSUPPORTED",
      object: storeName,
      problem: `${name} is of version ${String(manifest.version)}`,
      hint: "a later cowcatcher has written it",
    });
  }
  if (manifest.group !== expected.group || manifest.time !== expected.time) fail("it is of another backup");
  if (typeof manifest.run !== "string" || !Array.isArray(manifest.disks)) fail("it lacks what it must have");
  for (const disk of manifest.disks ?? []) {
    const isWhole =
      typeof disk.name === "string" &&
      Number.isSafeInteger(disk.size_bytes) &&
      typeof disk.index_sha256 === "string";
    if (!isWhole) fail("a disk lacks what it must have");
  }
  return manifest as Manifest;
}
