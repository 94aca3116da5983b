// `run --dry-run`: the commands that would be run, what is in their way, and what retention would remove now.
import { dirname } from "node:path";
import { toCowcatcherError } from "../../errors.js";
import { decideFiles } from "../../run/chain-retention.js";
import { foreignOverlays } from "../../run/foreign-overlays.js";
import type { Job } from "../../run/job.js";
import { planBackup, type Plan, targetFolders } from "../../run/plan.js";
import { checkFolders, checkMount, checkReach } from "../../run/preflight.js";
import { diskNames } from "../../run/served-names.js";
import { type OutputSettings, printJsonDocument, printLine } from "../output/context.js";
import { EXIT, exitCodeOfError } from "../output/exit-codes.js";
import { errorLine } from "../output/report.js";
import { worstExitCode } from "../../run/result.js";

export interface DryRunJob {
  job: string;
  level: string | null;
  level_reason: string | null;
  /** Command lines, as `cowcatcher` takes them. */
  commands: string[][];
  /** Files that retention would remove if the backup were not made; of a repository see `repo forget --dry-run`. */
  removes: string[];
  /** What would make it fail before it began. */
  error: string | null;
}

/** Resolves to the exit code. */
export async function printDryRun(
  jobs: readonly Job[],
  isFull: boolean,
  output: OutputSettings,
): Promise<number> {
  const documents: DryRunJob[] = [];
  const codes: number[] = [];
  for (const job of jobs) {
    const document: DryRunJob = {
      job: job.name,
      level: null,
      level_reason: null,
      commands: [],
      removes: [],
      error: null,
    };
    documents.push(document);
    try {
      const now = new Date();
      const names = await diskNames(job.source);
      await checkReach(job, targetFolders(job, names, now), false);
      const plan = await planBackup(job, names, now, isFull ? { fullBecause: "it was asked for" } : {});
      document.level = plan.level === "by-repository" ? null : plan.level;
      document.level_reason = plan.reason;
      document.commands = plan.commands.map(({ args }) => ["backup", ...args]);
      document.removes = await removes(job, plan);
      await checkMount(job);
      await checkFolders(job, plan, false);
    } catch (cause) {
      const error = toCowcatcherError(cause, job.name);
      document.error = error.message;
      codes.push(exitCodeOfError("run", error));
      output.stderr.write(`${errorLine(error).replace(/^cowcatcher: /, `cowcatcher: ${job.name}: `)}\n`);
    }
  }
  if (output.json) printJsonDocument(output, documents);
  else for (const document of documents) printJob(output, document);
  return codes.length === 0 ? EXIT.done : worstExitCode(codes);
}

async function removes({ retention }: Job, plan: Plan): Promise<string[]> {
  if (retention === undefined) return [];
  const removed: string[] = [];
  for (const { history, target } of plan.disks) {
    if (history.length === 0) continue;
    const overlays = await foreignOverlays(dirname(target), history);
    for (const { keep, backup } of decideFiles(history, retention, overlays)) {
      if (!keep) removed.push(backup.path);
    }
  }
  return removed;
}

function printJob(
  output: OutputSettings,
  { job, level, level_reason: reason, commands, removes: files }: DryRunJob,
): void {
  if (output.quiet) return;
  printLine(output, `${job}: ${level === null ? "" : `${level}: ${reason ?? ""}`}`.trimEnd());
  for (const words of commands) printLine(output, `  cowcatcher ${words.map(quoted).join(" ")}`);
  for (const file of files) printLine(output, `  removes ${file}`);
}

/** For a shell. */
function quoted(word: string): string {
  return /^[A-Za-z0-9_@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
}
