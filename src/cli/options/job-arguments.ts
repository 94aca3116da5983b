// What `backup` has to say of a job's arguments, before it is run: they go through the command's own options and checks.
import { Command } from "commander";
import { meant } from "../../run/file/shape.js";
import type { Job } from "../../run/job.js";
import { planFirst } from "../../run/plan.js";
import type { BackupFlags } from "./backup-flags.js";
import { addBackupOptions, parseBackupSettings } from "./backup-options.js";
import {
  addRepositoryBackupOptions,
  isRepositoryBackup,
  parseRepositoryBackup,
} from "./repository-backup.js";
import { usageError } from "./options.js";
import { asReportedError } from "./usage-errors.js";

/** @throws CowcatcherError USAGE, UNSUPPORTED, as `backup` would; IO for a file that it reads first. */
export function checkBackupArguments(args: readonly string[]): void {
  const command = backupCommand().action((words: string[], flags: BackupFlags) => {
    if (isRepositoryBackup(flags)) parseRepositoryBackup(words, flags);
    else parseBackupSettings(words, flags);
  });
  try {
    command.parse(args, { from: "user" });
  } catch (error) {
    throw asReportedError(error, "backup");
  }
}

/** The commands of a job's first backup. @throws as checkBackupArguments */
export function checkJobArguments(job: Job): void {
  const known = backupCommand().options.flatMap(({ long }) => long?.slice(2) ?? []);
  for (const option of job.options) {
    const name = option.slice(2).split("=")[0] ?? "";
    if (!known.includes(name)) throw usageError(`--${name}`, "is not an option", meant(name, known));
  }
  for (const { args } of planFirst(job).commands) checkBackupArguments(args);
}

function backupCommand(): Command {
  const command = new Command("backup").argument("[ARGUMENTS...]").exitOverride();
  command.configureOutput({
    writeOut: () => undefined,
    writeErr: () => undefined,
    outputError: () => undefined,
  });
  return addRepositoryBackupOptions(addBackupOptions(command)).option("--no-progress");
}
