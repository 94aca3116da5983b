// The repository's `config`: two or three lines of text, written once at `repo init`, the last thing there.
//
//   {"version":2,"id":"32 hex digits","created":"…","chunk_bytes":4194304,"compression":"zstd:1","encryption":"aes-256-gcm"}
//   sha256 HEX          of the first line
//   hmac-sha256 HEX     of the first line with the config key: only with encryption
//
// Version 1 knows no patches (patch.ts); such a repository is read and written as ever, without them.
//
// The last line keeps a store from turning encryption off, or from passing another repository for this one.

import { timingSafeEqual } from "node:crypto";
import { CowcatcherError } from "../../errors.js";
import { MiB } from "../../units.js";
import type { ChunkCompression } from "./chunk.js";
import { damagedError } from "./errors.js";
import { parseTextWithSum, textWithSum } from "./metadata.js";
import { CONFIG_NAME } from "./names.js";
import type { Encryption, Secrets } from "./secrets.js";

export const CHUNK_SIZES_BYTES: readonly number[] = [1 * MiB, 2 * MiB, 4 * MiB, 8 * MiB];
/** As of the Proxmox Backup Server: an index of 8 MiB for 1 TiB, and a change of 4 KiB costs 4 MiB before compression. */
export const DEFAULT_CHUNK_BYTES = 4 * MiB;
/** Of zstd. Incompressible data passes at memory speed, and level 3 costs half again as much time for 2 % less. */
export const DEFAULT_COMPRESSION: ChunkCompression = { type: "zstd", level: 1 };
export const MAX_CONFIG_BYTES = 64 * 1024;
/** Of new repositories. */
export const FORMAT_VERSION = 2;
export type FormatVersion = 1 | 2;

export interface RepositoryConfig {
  version: FormatVersion;
  id: string;
  created: string;
  chunkBytes: number;
  compression: ChunkCompression;
  encryption: Encryption;
}

export function encodeConfig(config: RepositoryConfig, secrets: Secrets): Buffer {
  const { version, id, created, chunkBytes, compression, encryption } = config;
  const text = textWithSum({
    version,
    id,
    created,
    chunk_bytes: chunkBytes,
    compression: compression === null ? "none" : `${compression.type}:${compression.level}`,
    encryption,
  });
  const check = secrets.configCheck(text.slice(0, text.indexOf("\n")));
  return Buffer.from(check === null ? text : `${text}hmac-sha256 ${check.toString("hex")}\n`);
}

export interface ReadConfig {
  config: RepositoryConfig;
  /** Whether these secrets are those that the config was written with. */
  isOf: (secrets: Secrets) => boolean;
}

/** @throws CowcatcherError FORMAT, UNSUPPORTED. */
export function decodeConfig(storeName: string, object: Buffer): ReadConfig {
  const { json, text, rest } = parseTextWithSum(storeName, CONFIG_NAME, object);
  const fail = (problem: string): never => {
    throw damagedError(storeName, CONFIG_NAME, problem);
  };
  const { version } = json;
  if (version !== 1 && version !== 2) {
    throw new CowcatcherError({
      code: "UNSUPPORTED",
      object: storeName,
      problem: `the repository is of version ${String(version)}`,
      hint: "use the cowcatcher that made it, or a later one",
    });
  }
  const { id, created, chunk_bytes: chunkBytes, encryption } = json;
  if (typeof id !== "string" || !/^[0-9a-f]{32}$/.test(id)) return fail("its id is none");
  if (typeof chunkBytes !== "number" || !CHUNK_SIZES_BYTES.includes(chunkBytes))
    return fail("its chunk size is none");
  if (encryption !== "none" && encryption !== "aes-256-gcm") return fail("its encryption is not known");
  const compression = parseChunkCompression(String(json["compression"]), `${storeName}: ${CONFIG_NAME}`);
  const config = { version, id, created: String(created), chunkBytes, compression, encryption } as const;
  return {
    config,
    isOf: (secrets) => {
      const check = secrets.configCheck(text);
      if (check === null) return encryption === "none";
      const stored = Buffer.from(/^hmac-sha256 ([0-9a-f]{64})$/.exec(rest[0] ?? "")?.[1] ?? "", "hex");
      return encryption !== "none" && stored.length === check.length && timingSafeEqual(stored, check);
    },
  };
}

/** "none", "zstd" or "zstd:LEVEL". @throws CowcatcherError USAGE, naming `object`. */
export function parseChunkCompression(text: string, object: string): ChunkCompression {
  if (text === "none") return null;
  const match = /^zstd(?::(\d{1,2}))?$/.exec(text);
  const level = match?.[1] === undefined ? 1 : Number(match[1]);
  if (match !== null && level >= 1 && level <= 19) return { type: "zstd", level };
  throw new CowcatcherError({
    code: "USAGE",
    object,
    problem: `'${text}' is no compression of chunks`,
    hint: "give none, zstd or zstd:LEVEL with a level from 1 to 19",
  });
}
