// What goes with `backup --checkpoint` and `--since`, and what does not.
import type { BackupFlags } from "./backup-flags.js";
import { unsupported, usageError } from "./options.js";
import { targetFormatOf } from "./target-format.js";

const NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$/;

/** Only a server keeps track of an image. @throws CowcatcherError USAGE */
export function refuseCheckpointFlags({ checkpoint, since, sinceOrFull }: BackupFlags): void {
  const given = Object.entries({ checkpoint, since, "since-or-full": sinceOrFull });
  const useless = given.find(([, value]) => value !== undefined);
  if (useless === undefined) return;
  throw usageError(
    `--${useless[0]}`,
    "needs --control",
    "the server that has the disk open keeps track of it",
  );
}

/** @throws CowcatcherError USAGE, UNSUPPORTED */
export function checkCheckpointFlags(target: string, flags: BackupFlags): void {
  const { checkpoint, since, sinceOrFull, sync, verify, backingFile } = flags;
  checkName("--checkpoint", checkpoint);
  checkName("--since", since);
  if (checkpoint !== undefined && sync === "none") {
    throw usageError("--checkpoint", "does not go with --sync none", "no backup is made");
  }
  if (since === undefined) {
    if (sinceOrFull === true) throw usageError("--since-or-full", "needs --since");
    return;
  }
  if (sync !== undefined && sync !== "full") {
    throw usageError("--since", `does not go with --sync ${sync}`, "leave --sync out");
  }
  if (verify === true) {
    throw unsupported("--verify", "an incremental backup cannot be read back", "use `compare` afterwards");
  }
  // Without an overlay's base the copy of what has changed is a heap of clusters.
  if (backingFile !== undefined) return;
  const format = targetFormatOf(target, flags.targetFormat);
  if (format === "raw") return;
  throw usageError(
    "--since",
    "needs --backing-file for a qcow2 target",
    "name the backup of that checkpoint with -b and -B, or write a raw TARGET of its state with -O raw --force",
  );
}

function checkName(option: string, name: string | undefined): void {
  if (name === undefined || NAME.test(name)) return;
  throw usageError(option, `'${name}' is no name`, "letters, digits, '.', '_' and '-', 128 at most");
}
