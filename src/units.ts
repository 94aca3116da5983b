// Sizes, durations and byte counts as users write and read them.
import { CowcatcherError } from "./errors.js";

export const KiB = 1024;
export const MiB = 1024 * KiB;
export const GiB = 1024 * MiB;
export const TiB = 1024 * GiB;

const SIZE_SUFFIX: Record<string, number> = {
  "": 1,
  B: 1,
  K: KiB,
  M: MiB,
  G: GiB,
  T: TiB,
  P: 1024 * TiB,
  E: 1024 * 1024 * TiB,
};
/** Hexadecimal digits take no suffix: B and E are digits. */
const HEX_SIZE = /^0x[0-9a-f]+$/i;

/**
 * Parses "64K", "1.5G", "512", "0x10000" (binary suffixes as in QEMU, either case) into bytes.
 * @throws CowcatcherError USAGE, naming `object`, for anything else, negative or beyond 2^53.
 */
export function parseSize(text: string, object: string): number {
  const bytes = bytesOf(text.trim());
  if (Number.isNaN(bytes)) {
    throw new CowcatcherError({
      code: "USAGE",
      object,
      problem: `'${text}' is not a size`,
      hint: "give bytes, or a number with K, M, G, T, P or E, such as 64K",
    });
  }
  if (!Number.isSafeInteger(bytes)) {
    throw new CowcatcherError({
      code: "USAGE",
      object,
      problem: `'${text}' is more than any size here, 8 PiB less a byte`,
      hint: "give less",
    });
  }
  return bytes;
}

/** NaN for what is no size. */
function bytesOf(text: string): number {
  if (HEX_SIZE.test(text)) return Number(text);
  const [, digits, suffix = ""] = /^(\d+(?:\.\d+)?)(?:([KMGTPE])(?:i?B)?|B)?$/i.exec(text) ?? [];
  return digits === undefined ? NaN : Math.round(Number(digits) * (SIZE_SUFFIX[suffix.toUpperCase()] ?? NaN));
}

/**
 * Parses "500ms", "30s", "5m" or plain seconds into milliseconds.
 * @throws CowcatcherError USAGE, naming `object`.
 */
export function parseDurationMs(text: string, object: string): number {
  const match = /^(\d+(?:\.\d+)?)(ms|s|m|h)?$/.exec(text.trim());
  const factor = { ms: 1, s: 1000, m: 60_000, h: 3_600_000 }[match?.[2] ?? "s"] ?? NaN;
  const ms = match ? Number(match[1]) * factor : NaN;
  if (!Number.isFinite(ms)) {
    throw new CowcatcherError({
      code: "USAGE",
      object,
      problem: `'${text}' is not a duration`,
      hint: "give seconds, or a number with ms, s or m, such as 500ms",
    });
  }
  return ms;
}

/** "1.5 GiB": three significant digits, binary units. */
export function formatBytes(bytes: number): string {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let value = bytes;
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1024;
    unit++;
  }
  const digits = unit === 0 || value >= 100 ? 0 : value >= 10 ? 1 : 2;
  return `${value.toFixed(digits)} ${units[unit]}`;
}

/** "12 ms", "3.4 s", "2:05", "1:02:03". */
export function formatDuration(ms: number): string {
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 60_000) return `${(ms / 1000).toFixed(1)} s`;
  const seconds = Math.round(ms / 1000);
  const two = (n: number) => String(n).padStart(2, "0");
  const hours = Math.floor(seconds / 3600);
  const minutes = Math.floor((seconds % 3600) / 60);
  return hours > 0 ? `${hours}:${two(minutes)}:${two(seconds % 60)}` : `${minutes}:${two(seconds % 60)}`;
}

/** The next multiple of `multiple` from `value` on. Exact up to 2^53 - 1. */
export function roundUp(value: number, multiple: number): number {
  return Math.ceil(value / multiple) * multiple;
}

/** The last multiple of `multiple` up to `value`. Exact up to 2^53 - 1. */
export function roundDown(value: number, multiple: number): number {
  return Math.floor(value / multiple) * multiple;
}
