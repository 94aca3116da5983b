// The options of `backup` that are about a guest's writes: which of them go with what.
import { absoluteName } from "../../file-names.js";
import { THROUGH_LIBVIRT } from "../../libvirt/domain-freeze.js";
import type { FreezeRequest } from "../../qemu/t0-gate.js";
import type { BackupFlags } from "./backup-flags.js";
import { NULL_TARGET, usageError } from "./options.js";

/** What is about the guest's writes. Passed over in silence, it would look as if it had been heeded. */
export function refuseLiveFlags(flags: BackupFlags): void {
  const { cowBufferSize, onBufferFull, spillDir, spillLimit, guestTimeout, onCbwError } = flags;
  const ofGuests = {
    freeze: flags.freeze,
    "t0-gate": flags.t0Gate,
    "cow-buffer-size": cowBufferSize,
    "on-buffer-full": onBufferFull,
    "spill-dir": spillDir,
    "spill-limit": spillLimit,
    "guest-timeout": guestTimeout,
    "on-cbw-error": onCbwError,
  };
  const useless = Object.entries(ofGuests).find(([, value]) => value !== undefined);
  if (useless === undefined) return;
  throw usageError(`--${useless[0]}`, "needs --control", "no guest writes to SOURCE, so there is no buffer");
}

/** Who freezes the guest for T0. @throws CowcatcherError USAGE */
export function freezeRequest({ freeze, t0Gate, libvirt }: BackupFlags): FreezeRequest | undefined {
  if (freeze === undefined) {
    if (t0Gate !== undefined)
      throw usageError("--t0-gate", "needs --freeze", "give the guest agent's socket");
    return undefined;
  }
  return {
    agent: agentOf(freeze, libvirt !== undefined),
    t0Gate: t0Gate === undefined ? undefined : absoluteName(t0Gate),
  };
}

/** A socket's whole path, or the word for libvirt's own channel. */
export function agentOf(freeze: string, isDomain: boolean): string {
  return isDomain && freeze === THROUGH_LIBVIRT ? freeze : absoluteName(freeze);
}

/** The ways of a full buffer, and how long a guest waits. @throws CowcatcherError USAGE */
export function checkBufferFlags({ onBufferFull, spillDir, spillLimit, guestTimeout }: BackupFlags): void {
  if (onBufferFull !== undefined && onBufferFull !== "spill") {
    const hint = "give --on-buffer-full spill";
    if (spillDir !== undefined) throw usageError("--spill-dir", `does not go with '${onBufferFull}'`, hint);
    if (spillLimit !== undefined)
      throw usageError("--spill-limit", `does not go with '${onBufferFull}'`, hint);
  }
  if (guestTimeout === 0)
    throw usageError("--guest-timeout", "0 is no time to wait", "give seconds, such as 45");
}

/** What cannot mean anything where nothing is copied. */
export function checkSnapshotFlags(targets: readonly string[], flags: BackupFlags): void {
  const target = targets.find((path) => path !== NULL_TARGET);
  if (target !== undefined) {
    throw usageError(target, "--sync none writes no target", "give null: and read the snapshot's export");
  }
  if (flags.onBufferFull === "wait") {
    throw usageError(
      "--on-buffer-full",
      "'wait' would wait for ever with --sync none",
      "give spill or cancel",
    );
  }
  if (flags.cowBufferSize === 0) {
    throw usageError("--cow-buffer-size", "--sync none keeps old data in the buffer", "give a size");
  }
  const {
    workers,
    rateLimit,
    targetFormat,
    clusterSize,
    backingFile,
    compress,
    direct,
    force,
    verify,
    dryRun,
  } = flags;
  const ofCopies = {
    workers,
    compress,
    "rate-limit": rateLimit,
    "target-format": targetFormat,
    direct,
    force,
    verify,
    "dry-run": dryRun,
  };
  const given = Object.entries({ ...ofCopies, "cluster-size": clusterSize, "backing-file": backingFile });
  const useless = given.find(([, value]) => value !== undefined);
  if (useless === undefined) return;
  throw usageError(`--${useless[0]}`, "does not go with --sync none", "nothing is copied");
}
