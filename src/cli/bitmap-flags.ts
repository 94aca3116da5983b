// What goes with `backup --bitmap`, an incremental pull from an NBD export, and what does not.
import type { BackupFlags } from "./backup-options.js";
import { isNbdUri, unsupported, usageError } from "./options.js";

const EXPORT_BITMAP = "export the image with the bitmap: qemu-nbd -B NAME";

/** A bitmap comes with an NBD export; and without what it builds on the copy of what is dirty is worth nothing. */
export function checkBitmapFlags([source]: readonly string[], flags: BackupFlags): void {
  const { bitmap, bitmapMode, sync, backingFile, verify } = flags;
  if (bitmap === undefined) {
    if (bitmapMode !== undefined) throw usageError("--bitmap-mode", "needs --bitmap");
    if (sync === "incremental") throw usageError("--sync", "incremental needs --bitmap", "give its name");
    return;
  }
  if (sync === "full") throw usageError("--bitmap", "does not go with --sync full", "leave --sync out");
  if (source !== undefined && !isNbdUri(source)) {
    throw unsupported("--bitmap", "the dirty bitmaps of image files are not supported", EXPORT_BITMAP);
  }
  if (bitmapMode !== undefined && bitmapMode !== "never") {
    const problem = `'${bitmapMode}' would change the bitmap, which an NBD client cannot`;
    throw unsupported("--bitmap-mode", problem, "give never, and clear the bitmap in QEMU");
  }
  if (backingFile === undefined) {
    throw usageError("--bitmap", "needs --backing-file", "name the backup that this one builds on");
  }
  if (verify === true) {
    throw unsupported("--verify", "an incremental backup cannot be read back", "use `compare` afterwards");
  }
}
