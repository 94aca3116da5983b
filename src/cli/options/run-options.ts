// The options of `run`.
import type { Command } from "commander";
import { countOption, pathOption, usageError } from "./options.js";

export interface RunFlags {
  all?: boolean;
  config?: string;
  check?: boolean;
  dryRun?: boolean;
  full?: boolean;
  parallel?: number;
}

export interface RunRequest {
  /** Names of jobs; undefined: all that are enabled. */
  names: readonly string[] | undefined;
  /** Folder or file; undefined: the user's. */
  config: string | undefined;
  mode: "run" | "check" | "dry-run";
  isFull: boolean;
  /** Jobs at a time. */
  parallel: number;
}

const PARALLEL_BOUNDS = { min: 1, max: 64 };

export function addRunOptions(command: Command): Command {
  return command
    .option("--all", "all jobs but those with `enabled: false`")
    .addOption(
      pathOption(
        "--config <DIR>",
        "folder of job files, or one (/etc/cowcatcher/jobs.d; of users ~/.config/cowcatcher/jobs.d)",
      ),
    )
    .option("--check", "only say what is wrong with the job files")
    .option("--dry-run", "only say what would be done")
    .option("--full", "full backups, whatever the jobs' levels say")
    .addOption(countOption("-j, --parallel <N>", "jobs at a time (1)", PARALLEL_BOUNDS));
}

/** @throws CowcatcherError USAGE */
export function parseRunRequest(names: readonly string[], flags: RunFlags): RunRequest {
  const { all = false, check = false, dryRun = false, full = false } = flags;
  if (all && names[0] !== undefined) throw usageError(names[0], "does not go with --all", "give one of them");
  if (check && dryRun) throw usageError("--check", "does not go with --dry-run", "give one of them");
  if (names.length === 0 && !all && !check)
    throw usageError("JOB", "is missing", "give names of jobs, or --all");
  return {
    names: names.length === 0 ? undefined : names,
    config: flags.config,
    mode: check ? "check" : dryRun ? "dry-run" : "run",
    isFull: full,
    parallel: flags.parallel ?? 1,
  };
}
