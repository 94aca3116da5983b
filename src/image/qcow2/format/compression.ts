// What a qcow2 image may be compressed with: the names, the levels and what they are by default.

import { CowcatcherError } from "../../../errors.js";
import type { CompressionType } from "./header.js";

export interface Compression {
  type: CompressionType;
  level: number;
}

export const COMPRESSION_TYPES: readonly CompressionType[] = ["zlib", "zstd"];
/** zstd: better and four times as fast as zlib. QEMU reads it from 5.1 on. */
export const DEFAULT_COMPRESSION_TYPE: CompressionType = "zstd";

interface LevelBounds {
  min: number;
  max: number;
  /** What QEMU compresses with, which has no other. */
  default: number;
}

export const COMPRESSION_LEVELS: Readonly<Record<CompressionType, LevelBounds>> = {
  zlib: { min: 1, max: 9, default: 6 },
  // Up to 22 exist; beyond 19 they only widen windows, which a cluster does not fill.
  zstd: { min: 1, max: 19, default: 3 },
};

/** What deflate may refer back to in a qcow2 image, in bits: QEMU decompresses with no more. */
export const QCOW2_DEFLATE_WINDOW_BITS = 12;

/** @throws CowcatcherError USAGE, naming `object`, for a level that the type does not have. */
export function compressionOf(type: CompressionType, level: number | undefined, object: string): Compression {
  const bounds = COMPRESSION_LEVELS[type];
  const chosen = level ?? bounds.default;
  if (Number.isInteger(chosen) && chosen >= bounds.min && chosen <= bounds.max)
    return { type, level: chosen };
  throw new CowcatcherError({
    code: "USAGE",
    object,
    problem: `${type} has no level ${chosen}`,
    hint: `give a number from ${bounds.min} to ${bounds.max}`,
  });
}

/**
 * Parses "zlib", "zstd", "zlib:9", "zstd:1".
 * @throws CowcatcherError USAGE, naming `object`.
 */
export function parseCompression(text: string, object: string): Compression {
  const [name = "", level, ...rest] = text.split(":");
  const type = COMPRESSION_TYPES.find((candidate) => candidate === name);
  if (type !== undefined && rest.length === 0 && (level === undefined || /^\d{1,3}$/.test(level))) {
    return compressionOf(type, level === undefined ? undefined : Number(level), object);
  }
  throw new CowcatcherError({
    code: "USAGE",
    object,
    problem: `'${text}' is no compression method`,
    hint:
      "there are zlib and zstd, with or without a level, such as zstd:3; a file of this name is ./" + text,
  });
}

/** Where zstd is asked for and is not to be had. */
export function noZstdError(object: string, problem: string): CowcatcherError {
  return new CowcatcherError({
    code: "UNSUPPORTED",
    object,
    problem: `${problem}, and neither this Node nor the system has zstd`,
    hint: "use Node 22.15 or later, or install libzstd (libzstd.so.1)",
  });
}
