// The format that a new image gets where nobody says it: by its extension, and by what stands there.
import { statSync } from "node:fs";
import { systemName } from "../../file-names.js";
import type { ImageFormat } from "../../block/format.js";
import { isOldNbdName } from "../../nbd/wire/uri.js";
import { formatByExtension, isNbdUri, isRbdAddress, STDIO, usageError } from "./options.js";

/** What these extensions mean is not written here: a file of another content under such a name would mislead. */
const FOREIGN_EXTENSIONS = new Set([
  ...["vmdk", "vdi", "vhd", "vhdx", "vpc", "qed", "hdd", "hds", "parallels", "dmg", "cloop", "bochs", "luks"],
  ...["iso", "ova", "ovf", "vma", "wim", "e01", "aff", "vbk", "vib", "pxar", "fidx", "didx"],
  ...["gz", "tgz", "bz2", "xz", "zst", "zstd", "lz4", "lzo", "lzma", "z", "br", "zip", "7z", "rar", "tar"],
]);

/**
 * The target's format as far as the command line can know it; undefined: the source's.
 * @param given what -O (or -f) says
 * @param option its name, for the hint
 * @throws CowcatcherError USAGE for an extension that means a format which is not written here.
 */
export function targetFormatOf(
  target: string,
  given: ImageFormat | undefined,
  option = "-O",
): ImageFormat | undefined {
  if (given !== undefined) return given;
  // What an export is called says nothing of it, and a machine boots from the disk, not from an image of it.
  const isExport = isNbdUri(target) || isOldNbdName(target) || isRbdAddress(target);
  if (isExport || target === STDIO || isBlockDevice(target)) return "raw";
  const extension = /\.([^./]+)$/.exec(target)?.[1]?.toLowerCase();
  if (extension !== undefined && FOREIGN_EXTENSIONS.has(extension)) {
    throw usageError(
      target,
      `.${extension} means a format that is not written here`,
      `name it .raw or .qcow2, or say ${option} raw or ${option} qcow2 if the name is meant`,
    );
  }
  return formatByExtension(target);
}

/** False where it cannot be looked at: whoever opens it says why. */
function isBlockDevice(path: string): boolean {
  try {
    return statSync(systemName(path)).isBlockDevice();
  } catch {
    return false;
  }
}
