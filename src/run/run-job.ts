// One job from its hooks' job-init to log-end.
//
//   window ─► locks ─► job-init ─► mount, plan, folders, space ─► job-start ─► tries ─► manifests ─► retention ─► job-end
//                 any failure behind job-init ─► job-abort          always, last ─► log-end
//
// A try is backup-start, the backup with t0 and thaw in it, backup-end or backup-abort. Which failures are tried again:
// those that may go better
// the next time (exit codes 1 and 13). Under `level: auto` a try that says that there is nothing to build upon (12) is made
// again at once as a full one, and counts as the same try. A server that does not tell its disks yet costs a try. Retention and
// verification of a repository come after the backup, under the same locks; where they fail, the job has failed, and the backup stays.
import { setTimeout as delay } from "node:timers/promises";
import { CowcatcherError, toCowcatcherError } from "../errors.js";
import { type ChildRequest, type ChildResult, type ProgramWords, runChild } from "./child.js";
import { keepBackups, noteBackups, verifyBackups } from "./aftermath.js";
import { EXIT_IGNORED, EXIT_INTERRUPTED, EXIT_NO_BASIS, exitCodeOf, mayGoBetter } from "./exit-codes.js";
import { runHook, type Phase, T0_HOOK_MS_MAX } from "./hooks.js";
import type { Job } from "./job.js";
import type { Locks } from "./locks.js";
import { type Plan, planBackup, type PlanLimits, targetFolders } from "./plan.js";
import { checkFolders, checkMount, checkReach, checkSpace } from "./preflight.js";
import { diskResults, lockKeys } from "./outcome.js";
import { type DiskResult, errorMember, type JobResult, type LineLevel } from "./result.js";
import { diskNames } from "./served-names.js";
import { awaitFreeSource, refuseBusySource, type SourceCheck } from "./source-check.js";
import { type GatedBackup, T0Phases } from "./t0-phases.js";
import { isInWindow } from "./window.js";

export interface RunSettings {
  program: ProgramWords;
  version: string;
  /** A full backup of every job, whatever its level says. */
  isFull: boolean;
  locks: Locks;
  /** Aborted: what runs is ended in good order, and nothing is begun. */
  signal: AbortSignal;
  /** What happens, as it happens: the job's name, and a line. */
  onLine: (job: string, level: LineLevel, line: string) => void;
  now?: (() => Date) | undefined;
  /** Whether another backup of the source is under way; in tests sources that are not there. */
  sourceCheck?: SourceCheck | undefined;
}

/** Of a job's log, for mail and hooks. */
const MAX_LOG_LINES = 500;

/** The result, and the job's log. Never rejects. */
export async function runJob(
  job: Job,
  settings: RunSettings,
): Promise<{ result: JobResult; log: readonly string[] }> {
  const run = new JobRun(job, settings);
  const result = await run.whole();
  return { result, log: run.log };
}

/** Of one try. */
interface Failure {
  exitCode: number;
  error: CowcatcherError;
}

class JobRun {
  readonly log: string[] = [];
  readonly #warnings: string[] = [];
  readonly #start: Date;
  readonly #removed: string[] = [];
  #plan: Plan | undefined;
  /** Of the disks, where the server tells them. */
  #names: readonly string[] | undefined;
  #limits: PlanLimits;
  #tries = 0;
  #disks: DiskResult[] = [];
  #level: JobResult["level"] = null;
  #levelReason: string | null = null;
  #isVerified = false;
  #exitCode = 0;
  #error: CowcatcherError | undefined;
  #descriptors: readonly number[] = [];
  /** Signals to children, but not to what cleans up. */
  readonly #signal: AbortSignal;

  constructor(
    private readonly job: Job,
    private readonly settings: RunSettings,
  ) {
    this.#start = settings.now?.() ?? new Date();
    this.#limits = settings.isFull ? { fullBecause: "it was asked for" } : {};
    this.#signal = settings.signal;
  }

  async whole(): Promise<JobResult> {
    const { job, settings } = this;
    if (job.window !== undefined && !isInWindow(job.window, this.#start)) {
      this.#say("info", `skipped: it is outside of the window ${job.window.text}`);
      return this.#result("skipped");
    }
    try {
      // Not even its hooks: job-init mounts, and wakes machines.
      this.#throwIfInterrupted();
      const locks = await settings.locks.take(lockKeys(job), job.lockWaitMs, this.#signal);
      this.#descriptors = locks.descriptors;
      try {
        await this.#locked();
      } finally {
        await locks.release();
      }
    } catch (error) {
      this.#fail(error);
    }
    return this.#result(this.#error === undefined ? "done" : "failed");
  }

  async #locked(): Promise<void> {
    try {
      await this.#hook("job-init");
      const plan = await this.#prepare();
      await this.#hook("job-start");
      await this.#tryUntilDone(plan);
      await this.#after();
      await this.#hook("job-end");
    } catch (error) {
      this.#fail(error);
      await this.#cleaningHook("job-abort");
    }
    await this.#cleaningHook("log-end");
  }

  async #prepare(): Promise<Plan> {
    const { job } = this;
    this.#throwIfInterrupted();
    await checkMount(job);
    const plan = await this.#nextPlan();
    await checkFolders(job, plan, true);
    await checkSpace(job, plan, (args) => this.#cowcatcher(args));
    return plan;
  }

  async #makePlan(names: readonly string[] | undefined): Promise<Plan> {
    this.#names = names;
    await checkReach(this.job, targetFolders(this.job, names, this.#start), true);
    const plan = await planBackup(this.job, names, this.#start, this.#limits);
    this.#plan = plan;
    return plan;
  }

  /**
   * Made when no other backup of the source is under way. A server that is just starting does not answer yet, nor may the
   * target's storage: asking in vain is a try as well.
   */
  async #nextPlan(): Promise<Plan> {
    const { job, settings } = this;
    const check = settings.sourceCheck ?? refuseBusySource;
    for (;;) {
      try {
        const names = await diskNames(job.source);
        const own = job.source.kind === "images" ? undefined : job.source.disks;
        await awaitFreeSource(job, own ?? names ?? [], check, this.#signal);
        return await this.#makePlan(names);
      } catch (cause) {
        this.#throwIfInterrupted();
        this.#tries++;
        const error = toCowcatcherError(cause, job.name);
        const isWorthIt = error.code === "BUSY" || mayGoBetter(exitCodeOf(error));
        if (!isWorthIt || this.#tries > job.retries) throw error;
        await this.#waitToTryAgain(error);
      }
    }
  }

  async #waitToTryAgain(error: CowcatcherError): Promise<void> {
    const { retries, retryWaitMs } = this.job;
    this.#say("warning", `${error.message}; trying again (${this.#tries} of ${retries})`);
    await delay(retryWaitMs, undefined, { signal: this.#signal }).catch(() => undefined);
    this.#throwIfInterrupted();
  }

  async #tryUntilDone(first: Plan): Promise<void> {
    const { job } = this;
    let plan = first;
    for (;;) {
      this.#tries++;
      const failure = await this.#try(plan);
      if (failure === undefined) return;
      this.#throwIfInterrupted();
      if (!mayGoBetter(failure.exitCode) || this.#tries > job.retries) throw failure.error;
      await this.#waitToTryAgain(failure.error);
      plan = await this.#nextPlan();
    }
  }

  /** Undefined when the backup is made. */
  async #try(first: Plan): Promise<Failure | undefined> {
    let failure: Failure;
    const phases = new T0Phases(this.job, {
      run: (phase) => this.#hook(phase),
      cleanUp: (phase) => this.#cleaningHook(phase),
    });
    try {
      await this.#hook("backup-start");
      for (let plan = first; ;) {
        const ended = await this.#backup(plan, phases);
        if (ended === undefined) {
          await phases.thaw();
          await this.#hook("backup-end");
          return undefined;
        }
        failure = ended;
        const next = ended.exitCode === EXIT_NO_BASIS ? this.#withoutBasis(plan, ended.error) : undefined;
        if (next === undefined) break;
        this.#limits = next;
        this.#say("warning", `${ended.error.message}: a full backup is made`);
        plan = await this.#makePlan(this.#names);
      }
    } catch (error) {
      failure = { exitCode: 1, error: toCowcatcherError(error, this.job.name) };
    }
    this.#error = failure.error;
    await phases.thaw();
    await this.#cleaningHook("backup-abort");
    this.#error = undefined;
    this.#exitCode = failure.exitCode;
    return failure;
  }

  /** What to plan instead, where the level allows it. */
  #withoutBasis(plan: Plan, { problem }: CowcatcherError): PlanLimits | undefined {
    if (this.job.level !== "auto") return undefined;
    if (plan.level === "incremental") return { fullBecause: problem };
    if (plan.isRemembered) return { fullBecause: problem, noMemory: true };
    return undefined;
  }

  async #backup(plan: Plan, phases: T0Phases): Promise<Failure | undefined> {
    const { result, refused } = await phases.around((gated) => this.#runBackup(plan, gated));
    return result === undefined || refused === undefined ? result : { exitCode: 1, error: refused };
  }

  async #runBackup(plan: Plan, gated: GatedBackup): Promise<Failure | undefined> {
    this.#level = plan.level === "by-repository" ? null : plan.level;
    this.#levelReason = plan.reason;
    this.#disks = [];
    this.#exitCode = 0;
    for (const { args, disks } of plan.commands) {
      const ended = await this.#cowcatcher(["backup", "--no-progress", ...gated.args, ...args], {
        timeLimitMs: this.job.timeLimitMs,
        onMessage: gated.onMessage,
      });
      const { exitCode, error, isOverdue } = ended;
      if (exitCode !== 0 && exitCode !== EXIT_IGNORED) {
        return {
          exitCode: isOverdue ? 1 : exitCode,
          error: isOverdue ? this.#overdue() : (error ?? this.#unknown("failed without a word")),
        };
      }
      this.#exitCode = Math.max(this.#exitCode, exitCode);
      const found = diskResults(ended.messages, disks);
      // Whatever said nothing of a backup has made none.
      if (found === undefined) return { exitCode: 1, error: this.#unknown("ended without a result") };
      this.#disks.push(...found.disks);
      if (found.level !== undefined) this.#level = found.level;
      if (found.levelReason !== undefined) this.#levelReason = found.levelReason;
    }
    return undefined;
  }

  async #after(): Promise<void> {
    const plan = this.#plan;
    if (plan === undefined) return;
    await checkReach(this.job, targetFolders(this.job, this.#names, this.#start), true);
    const work = {
      job: this.job,
      plan,
      disks: this.#disks,
      level: this.#level ?? "full",
      levelReason: this.#levelReason ?? "",
      start: this.#start,
      version: this.settings.version,
      run: (args: readonly string[]) => this.#cowcatcher(args),
      say: (level: LineLevel, line: string) => this.#say(level, line),
    };
    // Before the manifest, as it tells of it.
    this.#isVerified = await verifyBackups(work);
    await noteBackups({ ...work, isVerified: this.#isVerified });
    if (this.#exitCode === EXIT_IGNORED && this.job.retention !== undefined)
      this.#say(
        "warning",
        "nothing is removed after a backup with errors: the last good one may be an old one",
      );
    else this.#removed.push(...(await keepBackups(work)));
  }

  #cowcatcher(
    args: readonly string[],
    more: Pick<ChildRequest, "timeLimitMs" | "onMessage"> = {},
  ): Promise<ChildResult> {
    return runChild(this.settings.program, {
      ...more,
      args: [...args, "--json"],
      descriptors: this.#descriptors,
      signal: this.#signal,
      onLine: (line) => this.#childLine(line),
    });
  }

  /** What a command says on standard error: its warnings; its error comes with its result. */
  #childLine(line: string): void {
    const text = line.replace(/^cowcatcher: /, "");
    const isWarning = text.startsWith("warning: ");
    if (isWarning) this.#say("warning", text.slice("warning: ".length));
    else this.#note(line);
  }

  #hook(phase: Phase, cleansUp = false): Promise<void> {
    const { hook, hookTimeoutMs, name, group } = this.job;
    if (hook === undefined) return Promise.resolve();
    const disks = this.#plan?.disks ?? [];
    return runHook({
      command: hook,
      phase,
      job: name,
      timeoutMs: phase === "t0" ? Math.min(hookTimeoutMs, T0_HOOK_MS_MAX) : hookTimeoutMs,
      variables: {
        GROUP: group,
        DISKS: disks.map(({ label }) => label).join(" "),
        TARGETS: disks.map(({ target }) => target).join("\n"),
        LEVEL: this.#level ?? "",
        ERROR: this.#error?.message ?? "",
      },
      document: {
        phase,
        ...this.#result(this.#error === undefined ? "done" : "failed"),
        ...(phase === "log-end" ? { log: this.log } : {}),
      },
      onLine: (line) => this.#say("info", `hook ${phase}: ${line}`),
      signal: cleansUp ? undefined : this.#signal,
    });
  }

  /** Its failure changes nothing. */
  async #cleaningHook(phase: Phase): Promise<void> {
    try {
      await this.#hook(phase, true);
    } catch (error) {
      this.#say("warning", toCowcatcherError(error, this.job.name).message);
    }
  }

  /** The first cause stays. */
  #fail(cause: unknown): void {
    if (this.#error !== undefined) return;
    const error = toCowcatcherError(cause, this.job.name);
    this.#error = error;
    if (this.settings.signal.aborted) this.#exitCode = EXIT_INTERRUPTED;
    else if (this.#exitCode === 0 || this.#exitCode === EXIT_IGNORED) this.#exitCode = exitCodeOf(error);
    this.#say("error", error.message);
  }

  #say(level: LineLevel, line: string): void {
    if (level === "warning") this.#warnings.push(line);
    this.#note(`${level === "info" ? "" : `${level}: `}${line}`);
    this.settings.onLine(this.job.name, level, line);
  }

  #note(line: string): void {
    if (this.log.length < MAX_LOG_LINES) this.log.push(`${new Date().toISOString()} ${line}`);
  }

  #throwIfInterrupted(): void {
    if (!this.#signal.aborted) return;
    throw new CowcatcherError({
      code: "CANCELLED",
      object: this.job.name,
      problem: "the run was interrupted",
    });
  }

  #overdue(): CowcatcherError {
    const seconds = Math.round((this.job.timeLimitMs ?? 0) / 1000);
    return new CowcatcherError({
      code: "LIMIT",
      object: this.job.name,
      problem: `the backup took longer than time-limit (${seconds} s) and was ended`,
    });
  }

  #unknown(how: string): CowcatcherError {
    return new CowcatcherError({
      code: "INTERNAL",
      object: this.job.name,
      problem: `the backup ${how}`,
    });
  }

  #result(result: JobResult["result"]): JobResult {
    const { name, group } = this.job;
    const ended = this.settings.now?.() ?? new Date();
    return {
      job: name,
      group,
      result,
      exit_code: this.#exitCode,
      started: this.#start.toISOString(),
      ended: ended.toISOString(),
      seconds: (ended.getTime() - this.#start.getTime()) / 1000,
      level: this.#level,
      level_reason: this.#levelReason,
      tries: this.#tries,
      verified: this.#isVerified,
      disks: this.#disks,
      removed: [...this.#removed],
      warnings: [...this.#warnings],
      error: this.#error === undefined ? null : errorMember(this.#error),
    };
  }
}
