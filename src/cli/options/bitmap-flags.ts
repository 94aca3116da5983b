// What goes with `backup --bitmap`, an incremental copy of an image or an NBD export, and what does not.
import type { BackupFlags } from "./backup-flags.js";
import { isOldNbdName } from "../../nbd/wire/uri.js";
import { isNbdUri, isRbdAddress, unsupported, usageError } from "./options.js";

/** A bitmap is never changed here; and without what it builds on the copy of what is dirty is worth nothing. */
export function checkBitmapFlags([source, target]: readonly string[], flags: BackupFlags): void {
  const { bitmap, bitmapMode, sync, backingFile, verify, snapshot } = flags;
  if (bitmap === undefined) {
    if (bitmapMode !== undefined) throw usageError("--bitmap-mode", "needs --bitmap");
    if (sync === "incremental") throw usageError("--sync", "incremental needs --bitmap", "give its name");
    return;
  }
  if (sync === "full" || sync === "top")
    throw usageError("--bitmap", `does not go with --sync ${sync}`, "leave --sync out");
  checkBitmapMode(source, bitmapMode);
  if (snapshot !== undefined) {
    throw usageError("--bitmap", "does not go with --snapshot", "a bitmap tells of the disk as it is");
  }
  // The image itself is what the backup builds on; its snapshots keep what was before.
  const isInPlace = target !== undefined && isRbdAddress(target);
  if (isInPlace && flags.force !== true) {
    throw usageError(
      "--bitmap",
      "needs --force with an rbd: TARGET",
      "the image holds the backup before this one",
    );
  }
  if (backingFile === undefined && !isInPlace) {
    throw usageError("--bitmap", "needs --backing-file", "name the backup that this one builds on");
  }
  if (verify === true) {
    throw unsupported("--verify", "an incremental backup cannot be read back", "use `compare` afterwards");
  }
}

/** QEMU's other modes change the bitmap, which is not done here: who asks for one has to hear that it stays. */
function checkBitmapMode(source: string | undefined, mode: string | undefined): void {
  if (mode === undefined || mode === "never") return;
  if (source !== undefined && (isNbdUri(source) || isOldNbdName(source))) {
    const problem = `'${mode}' would change the bitmap, which an NBD client cannot`;
    throw unsupported("--bitmap-mode", problem, "give never, and clear the bitmap in QEMU");
  }
  const hint = "give never, and afterwards run: qemu-img bitmap --clear IMAGE NAME";
  throw unsupported("--bitmap-mode", `'${mode}' would change the image`, hint);
}
