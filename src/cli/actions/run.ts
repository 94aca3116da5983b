// `run`: jobs by their files.
import { fstatSync } from "node:fs";
import { toCowcatcherError } from "../../errors.js";
import { faultLine, type FileFault } from "../../run/file/parse.js";
import { defaultJobFolder, loadJobs, type LoadedJobs } from "../../run/file/load.js";
import type { Job } from "../../run/job.js";
import { lockFolder, Locks } from "../../run/locks.js";
import { composeMails, sendMail } from "../../run/notice/mail.js";
import { Notices } from "../../run/notice/notices.js";
import { COMMAND_ENTRY } from "../../run/program-file.js";
import { runJobs } from "../../run/run-jobs.js";
import { type JobResult, type LineLevel, worstExitCode } from "../../run/result.js";
import { checkJobArguments } from "../options/job-arguments.js";
import { usageError } from "../options/options.js";
import type { RunRequest } from "../options/run-options.js";
import { coloured, hasColours } from "../output/colour.js";
import { type CommandContext, type OutputSettings, printJsonDocument, printLine } from "../output/context.js";
import { EXIT, interruptExitCode } from "../output/exit-codes.js";
import { onInterrupt } from "../signals.js";
import { packageVersion } from "../version.js";
import { printDryRun } from "./run-dry-run.js";
import { summaryTable } from "./run-table.js";

/** What `run --json` prints. */
export interface RunDocument {
  version: string;
  started: string;
  ended: string;
  exit_code: number;
  jobs: JobResult[];
  /** What is wrong with job files. */
  faults: FaultDocument[];
}

export interface FaultDocument {
  file: string;
  line: number;
  column: number;
  path: string;
  problem: string;
  hint: string | null;
}

/** Resolves to the exit code. @throws CowcatcherError USAGE for a job that is not there; of the folder of job files. */
export async function runRun(request: RunRequest, context: CommandContext): Promise<number> {
  const started = new Date().toISOString();
  const { output } = context;
  const loaded = await loadJobs(request.config ?? defaultJobFolder(), checkJobArguments);
  const journal = new Journal(output);
  for (const fault of loaded.faults) journal.line("error", faultLine(fault));
  const jobs = chooseJobs(request, loaded);
  if (request.mode === "check") return printCheck(loaded, output);
  if (request.mode === "dry-run") {
    const code = await printDryRun(jobs, request.isFull, output);
    return worstExitCode([code, ...faultCodes(loaded)]);
  }
  const interruption = new AbortController();
  const say = (job: string, level: LineLevel, line: string): void => {
    // At one level, as at the default one the log goes to standard error, where the line stands already.
    context.logger.info({ job, level }, line);
    journal.line(level, line.startsWith(`${job}: `) ? line : `${job}: ${line}`);
  };
  const notices = new Notices((job, problem) => say(job, "warning", problem));
  const removeHandlers = onInterrupt(context, { onFirst: () => interruption.abort() });
  try {
    const finished = await runJobs(jobs, {
      program: [process.execPath, COMMAND_ENTRY],
      version: packageVersion(),
      isFull: request.isFull,
      parallel: request.parallel,
      locks: new Locks(lockFolder()),
      signal: interruption.signal,
      onLine: say,
      onStarted: (job) => notices.started(job),
      onFinished: ({ job, result }) => notices.finished(job, result),
    });
    for (const mail of composeMails(finished, summaryTable)) {
      await sendMail(mail).catch((error: unknown) => {
        journal.line("warning", toCowcatcherError(error, "mail").message);
      });
    }
    const results = finished.map(({ result }) => result);
    const exitCode =
      context.interruptedBy === undefined
        ? worstExitCode([...results.map(({ exit_code }) => exit_code), ...faultCodes(loaded)])
        : interruptExitCode(context.interruptedBy);
    if (output.json) {
      printJsonDocument(output, {
        version: packageVersion(),
        started,
        ended: new Date().toISOString(),
        exit_code: exitCode,
        jobs: results,
        faults: loaded.faults.map(faultDocument),
      } satisfies RunDocument);
    } else if (!output.quiet) {
      const isColoured = hasColours(output.stdout, process.env);
      for (const [row, line] of summaryTable(results).entries()) {
        const isBad = row > 0 && results[row - 1]?.result === "failed";
        printLine(output, coloured(line, "red", isColoured && isBad));
      }
    }
    return exitCode;
  } finally {
    removeHandlers();
  }
}

function faultCodes({ faults }: LoadedJobs): number[] {
  return faults.length === 0 ? [] : [EXIT.usage];
}

/** @throws CowcatcherError USAGE */
function chooseJobs({ names, mode }: RunRequest, { jobs, names: known }: LoadedJobs): Job[] {
  if (names === undefined) return mode === "check" ? jobs : jobs.filter(({ isEnabled }) => isEnabled);
  for (const name of names) {
    if (known.has(name)) continue;
    const hint = known.size === 0 ? "there are no jobs" : `there are ${[...known].sort().join(", ")}`;
    throw usageError(name, "is no job", hint);
  }
  return jobs.filter(({ name }) => names.includes(name));
}

function faultDocument({ file, line, column, path, problem, hint }: FileFault): FaultDocument {
  return { file, line, column, path, problem, hint: hint ?? null };
}

function printCheck(loaded: LoadedJobs, output: OutputSettings): number {
  const { files, jobs, faults } = loaded;
  if (output.json) {
    printJsonDocument(output, {
      files,
      jobs: jobs.map(({ name }) => name),
      faults: faults.map(faultDocument),
    });
  } else if (!output.quiet && faults.length === 0) {
    printLine(output, `${counted(jobs.length, "job")} in ${counted(files.length, "file")}: nothing is wrong`);
  }
  return faults.length === 0 ? EXIT.done : EXIT.usage;
}

function counted(count: number, noun: string): string {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

/** Priorities of syslog(3), which the journal reads from the start of a line (sd-daemon(3)). */
const PRIORITY = { error: 3, warning: 4, info: 6 } as const;

/** Lines on standard error, with priorities where that is the journal. */
class Journal {
  readonly #isJournal: boolean;

  constructor(private readonly output: OutputSettings) {
    this.#isJournal = isJournalStream(2, process.env["JOURNAL_STREAM"]);
  }

  line(level: LineLevel, text: string): void {
    if (level !== "error" && this.output.quiet) return;
    const priority = this.#isJournal ? `<${PRIORITY[level]}>` : "";
    const word = level === "warning" ? "warning: " : "";
    const plain = text.replace(/[\u0000-\u001f\u007f-\u009f]+/g, " ");
    this.output.stderr.write(`${priority}cowcatcher: ${word}${plain}\n`);
  }
}

/** systemd says which device and inode its journal's socket has (systemd.exec(5), JOURNAL_STREAM). */
function isJournalStream(fd: number, stream: string | undefined): boolean {
  if (stream === undefined) return false;
  try {
    const { dev, ino } = fstatSync(fd);
    return stream === `${dev}:${ino}`;
  } catch {
    return false;
  }
}
