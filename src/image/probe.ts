// Which format the first 512 bytes of a file announce, by the headers that QEMU's drivers look for.
//
// The same table serves two callers: opening without -f, and the guard that keeps a raw image which was only
// probed from becoming another format by a guest's write (QEMU: block/raw-format.c). The guard must therefore
// know at least what this project's and QEMU's own probing would find.

import { CowcatcherError } from "../errors.js";
import type { ImageFormat } from "../block/format.js";

/** As much of a file as a format's header is looked for in (QEMU's BLOCK_PROBE_BUF_SIZE). */
export const PROBE_BYTES = 512;

interface Signature {
  format: string;
  offset: number;
  bytes: Uint8Array;
}

function signature(format: string, text: string, offset = 0): Signature {
  return { format, offset, bytes: Uint8Array.from(text, (character) => character.charCodeAt(0)) };
}

const SIGNATURES: readonly Signature[] = [
  // Versions 2 and 3 are qcow2; QEMU takes others, 1 included, for other drivers.
  signature("qcow2", "QFI\xfb\0\0\0\x02"),
  signature("qcow2", "QFI\xfb\0\0\0\x03"),
  signature("qcow", "QFI\xfb"),
  signature("vmdk", "KDMV"),
  signature("vmdk", "COWD"),
  signature("qed", "QED\0"),
  signature("vhdx", "vhdxfile"),
  signature("vpc", "conectix"),
  signature("vdi", "\x7f\x10\xda\xbe", 0x40),
  signature("parallels", "WithoutFreeSpace"),
  signature("parallels", "WithouFreSpacExt"),
  signature("luks", "LUKS\xba\xbe"),
  signature("bochs", "Bochs Virtual HD Image"),
  signature("cloop", "#!/bin/sh\n#V2.0 Format\n"),
];

/** @returns the format's QEMU name, or "raw" where no header is known. `sector` may be short (a tiny file). */
export function probeSignature(sector: Uint8Array): string {
  for (const { format, offset, bytes } of SIGNATURES) {
    if (offset + bytes.length > sector.length) continue;
    if (bytes.every((byte, index) => sector[offset + index] === byte)) return format;
  }
  return isVmdkDescriptor(sector) ? "vmdk" : "raw";
}

/** VMDK's text form: comment lines and blank lines, then "version=N". */
function isVmdkDescriptor(sector: Uint8Array): boolean {
  const first = sector[0];
  const canStartLine = first === 0x23 || first === 0x76 || first === 0x20 || first === 0x0a || first === 0x0d;
  if (!canStartLine) return false;
  const text = Buffer.from(sector.buffer, sector.byteOffset, sector.length).toString("latin1");
  return text.startsWith("# Disk DescriptorFile") || /^(?:(?:#[^\n]*| *\r?)\n)*version=[1-4]\r?\n/.test(text);
}

/**
 * @param sector the first PROBE_BYTES of the file, or all of a shorter one.
 * @throws CowcatcherError UNSUPPORTED, naming the foreign format.
 */
export function probeFormat(name: string, sector: Uint8Array): ImageFormat {
  const found = probeSignature(sector);
  if (found === "raw" || found === "qcow2") return found;
  if (found === "luks") throw encrypted(name);
  const version = found === "qcow" ? ` (qcow header, version ${headerVersion(sector)})` : "";
  throw new CowcatcherError({
    code: "UNSUPPORTED",
    object: name,
    problem: `the image is in the format '${found}'${version}, which is not supported`,
    hint: "convert it with qemu-img convert, or give -f raw to take its bytes as they are",
  });
}

/** A backup of it is as good as any, and as secret as its source. */
function encrypted(name: string): CowcatcherError {
  return new CowcatcherError({
    code: "UNSUPPORTED",
    object: name,
    problem: "the image is encrypted (LUKS), and its content is not read here",
    hint: "give -f raw: a copy of the ciphertext is a sound backup, which the same key opens",
  });
}

function headerVersion(sector: Uint8Array): number | string {
  if (sector.length < 8) return "?";
  return new DataView(sector.buffer, sector.byteOffset).getUint32(4);
}
