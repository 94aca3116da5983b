// What a finished backup in a repository says: a few lines for people, one object for scripts. One for all its disks.
import type { FreezeInfo } from "../../backup/job/while-frozen.js";
import type { JobProgress } from "../../backup/progress.js";
import { formatBytes, formatDuration } from "../../units.js";
import { type CommandContext, printJsonLine, printLine } from "../output/context.js";
import { warn } from "../output/report.js";
import { packageVersion } from "../version.js";
import { now } from "./json.js";
import { captureLine, freezeLine, freezeMembers, qemuLine, qemuMembers } from "./summary.js";
import type { QemuFacts } from "./view.js";

/** What is left when such a backup was given up. */
export const NO_BACKUP = "there is no such backup; what was stored is used by the next one";

export interface RepositorySummary {
  group: string;
  /** The backup's name: T0. */
  time: string;
  level: "full" | "incremental";
  reason: string;
  /** What the clock said at T0, where that was before the group's last backup. */
  clockBehind?: string | undefined;
  disks: readonly RepositoryDiskSummary[];
  qemu?: QemuFacts | undefined;
  freeze?: FreezeInfo | undefined;
}

export interface RepositoryDiskSummary {
  disk: string;
  sizeBytes: number;
  newChunks: number;
  newBytes: number;
  readBytes: number;
  ignoredErrors: number;
  /** Of a live backup: what the guest met with. */
  guest?: JobProgress | undefined;
}

/** @param target REPO::GROUP */
export function printRepositoryResult(
  summary: RepositorySummary,
  target: string,
  elapsedMs: number,
  { output }: CommandContext,
): void {
  const { group, time, level, reason, clockBehind, disks, qemu, freeze } = summary;
  if (clockBehind !== undefined) {
    warn(
      output,
      `the clock says ${clockBehind}, before the group's last backup, which this one is named to follow: see to the clock`,
    );
  }
  const bytes = disks.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0);
  const newBytes = disks.reduce((sum, disk) => sum + disk.newBytes, 0);
  if (output.json) {
    printJsonLine(output, {
      message_type: "summary",
      time: now(),
      version: packageVersion(),
      target: `${target}@${time}`,
      group,
      t0: time,
      level,
      level_reason: reason,
      bytes,
      new_bytes: newBytes,
      seconds: Math.round(elapsedMs) / 1000,
      ignored_errors: disks.reduce((sum, { ignoredErrors }) => sum + ignoredErrors, 0),
      ...(qemu === undefined ? {} : qemuMembers(qemu)),
      ...(freeze === undefined ? {} : freezeMembers(freeze)),
      disks: disks.map((disk) => ({
        disk: disk.disk,
        bytes: disk.sizeBytes,
        read_bytes: disk.readBytes,
        new_chunks: disk.newChunks,
        new_bytes: disk.newBytes,
        ...(disk.guest === undefined ? {} : guestMembers(disk.guest)),
      })),
    });
    return;
  }
  if (output.quiet) return;
  const rate = elapsedMs > 0 ? (bytes * 1000) / elapsedMs : 0;
  printLine(
    output,
    `${target}@${time}: ${disks.map(({ disk }) => disk).join(", ")}, ${formatBytes(bytes)} in ` +
      `${formatDuration(elapsedMs)} (${formatBytes(rate)}/s), ${formatBytes(newBytes)} new`,
  );
  printLine(output, `  ${level}: ${reason}`);
  for (const { disk, guest } of disks) {
    if (guest !== undefined) printLine(output, `  ${disk}:${captureLine(guest).replace(/^ /, "")}`);
  }
  if (qemu !== undefined) printLine(output, qemuLine(qemu));
  if (freeze !== undefined) printLine(output, freezeLine(freeze));
}

function guestMembers(progress: JobProgress) {
  return {
    captures: progress.captureCount,
    captured_bytes: progress.capturedBytes,
    spilled_bytes: progress.spilledBytes,
    guest_waits: progress.guestWaitCount,
    guest_wait_ms_max: progress.guestWaitMsMax,
    guest_wait_ms_total: progress.guestWaitMsTotal,
  };
}
