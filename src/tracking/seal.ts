// What every piece of a tracking folder has in common: little-endian fields, and at its end a CRC-32C of all before it.

import { crc32c } from "./crc32c.js";

/** Bytes of a UUID in binary form. */
export const UUID_BYTES = 16;
export const CRC_BYTES = 4;

export function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

/** Writes the checksum into the last four bytes. */
export function seal(bytes: Uint8Array): void {
  const end = bytes.length - CRC_BYTES;
  viewOf(bytes).setUint32(end, crc32c(bytes, 0, end), true);
}

export function isSealed(bytes: Uint8Array): boolean {
  const end = bytes.length - CRC_BYTES;
  return end > 0 && viewOf(bytes).getUint32(end, true) === crc32c(bytes, 0, end);
}

export function isBlank(bytes: Uint8Array): boolean {
  return bytes.every((byte) => byte === 0);
}

export function putUuid(bytes: Uint8Array, offset: number, uuid: string): void {
  bytes.set(Buffer.from(uuid.replaceAll("-", ""), "hex").subarray(0, UUID_BYTES), offset);
}

export function getUuid(bytes: Uint8Array, offset: number): string {
  const hex = Buffer.from(bytes.subarray(offset, offset + UUID_BYTES)).toString("hex");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}

/** A 64-bit field as an exact number; NaN beyond 2^53, which no field has. */
export function getNumber(view: DataView, offset: number): number {
  const value = Number(view.getBigUint64(offset, true));
  return Number.isSafeInteger(value) ? value : NaN;
}
