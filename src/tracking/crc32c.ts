// CRC-32C (Castagnoli), as iSCSI (RFC 3720, appendix B.4), ext4 and DRBD's activity log have it: polynomial 0x1EDC6F41,
// reflected. Node's zlib has the other one only. A table of 256 entries is fast enough for what is checked here: records
// of 512 bytes, and files of some 100 KiB that are written in the background.

const REFLECTED_POLYNOMIAL = 0x82f63b78;

const TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  let remainder = byte;
  for (let bit = 0; bit < 8; bit++) {
    remainder = (remainder & 1) === 1 ? (remainder >>> 1) ^ REFLECTED_POLYNOMIAL : remainder >>> 1;
  }
  return remainder;
});

/** Of bytes [from, to); an unsigned 32-bit number. Any thread. */
export function crc32c(bytes: Uint8Array, from = 0, to = bytes.length): number {
  let remainder = 0xffffffff;
  for (let at = from; at < to; at++) {
    remainder = (TABLE[(remainder ^ (bytes[at] ?? 0)) & 0xff] ?? 0) ^ (remainder >>> 8);
  }
  return (remainder ^ 0xffffffff) >>> 0;
}
