// Hooks: a program that is run at each phase of a job, as vzdump's --script.
//
//   job-init      before anything is looked at: mount the backup disk, wake the machine that has it
//   job-start     the checks went well
//   backup-start  before each try
//   t0            the guest's file systems are frozen, and T0 waits for this phase alone (with `freeze`)
//   thaw          of a running guest: T0 is over and the guest thawed, or neither will come about
//   backup-end    after a try that went well
//   backup-abort  after one that did not
//   job-end       all is done: verified, old backups removed
//   job-abort     something failed, a hook among it
//   log-end       last of all, whatever happened
//
// A hook that fails, or takes longer than hook-timeout, makes its job fail, but for thaw, backup-abort, job-abort and log-end,
// which clean up: of those it is told, no more. After job-init has been started, one of job-end and job-abort comes for
// certain, and log-end; where job-end fails, job-abort comes, too. After backup-start has been started, thaw comes for
// certain, also where backup-start or t0 failed, and soon: while the backup is copied, before its end. t0 has 20 s at most,
// whatever hook-timeout says, as the guest cannot write meanwhile.
//
// The program gets the phase and the job's name as its arguments, COWCATCHER_PHASE, _JOB, _GROUP, _DISKS, _TARGETS,
// _LEVEL and _ERROR in its environment, and the same and more as JSON on its standard input.
import { spawn } from "node:child_process";
import { CowcatcherError, ioError } from "../errors.js";
import { formatDuration } from "../units.js";
import { endGroup, forEachLine } from "./child.js";

export type Phase =
  | "job-init"
  | "job-start"
  | "backup-start"
  | "t0"
  | "thaw"
  | "backup-end"
  | "backup-abort"
  | "job-end"
  | "job-abort"
  | "log-end";

/** Of the phase t0: with what ends a hook that takes too long, less than a gate may stay shut (qemu/t0-gate.ts). */
export const T0_HOOK_MS_MAX = 20_000;
/** From being asked to end to being ended. */
const GRACE_MS = 5_000;
const TIMER_MS_MAX = 2 ** 31 - 1;

export interface HookCall {
  /** Program and arguments. */
  command: readonly string[];
  phase: Phase;
  job: string;
  timeoutMs: number;
  /** COWCATCHER_… by the rest of their names. */
  variables: Record<string, string>;
  /** On standard input, as JSON. */
  document: unknown;
  onLine: (line: string) => void;
  /** Aborted: it is ended. Of what cleans up undefined: that runs to its end. */
  signal?: AbortSignal | undefined;
}

/** @throws CowcatcherError INTERNAL where it cannot be started, ends with another code than 0, or takes too long. */
export async function runHook(call: HookCall): Promise<void> {
  const { command, phase, job, timeoutMs, variables, document, onLine } = call;
  const [program = "", ...words] = command;
  const environment = Object.fromEntries(
    Object.entries({ PHASE: phase, JOB: job, ...variables }).map(([name, value]) => [
      `COWCATCHER_${name}`,
      value,
    ]),
  );
  const child = spawn(program, [...words, phase, job], {
    stdio: ["pipe", "pipe", "pipe"],
    env: { ...process.env, ...environment },
    // A group of its own, so that what it starts is ended with it.
    detached: true,
  });
  // It need not read what it is told.
  child.stdin.on("error", () => undefined);
  child.stdin.end(`${JSON.stringify(document)}\n`);
  forEachLine(child.stdout, onLine);
  forEachLine(child.stderr, onLine);
  let whyEnded: string | undefined;
  let killer: NodeJS.Timeout | undefined;
  let leave: () => void = () => undefined;
  const end = (why: string): void => {
    if (whyEnded !== undefined) return;
    whyEnded = why;
    endGroup(child.pid, "SIGTERM");
    killer = setTimeout(() => {
      endGroup(child.pid, "SIGKILL");
      // What has left the group may hold the pipes.
      child.stdout.destroy();
      child.stderr.destroy();
      // An unmount of storage that does not answer is not ended by any signal.
      killer = setTimeout(() => leave(), GRACE_MS);
    }, GRACE_MS);
  };
  const timer = setTimeout(
    () => end(`took longer than ${formatDuration(timeoutMs)}`),
    Math.min(timeoutMs, TIMER_MS_MAX),
  );
  const onAbort = (): void => end("was ended, as the run was interrupted");
  call.signal?.addEventListener("abort", onAbort, { once: true });
  if (call.signal?.aborted === true) onAbort();
  try {
    const [code, signal] = await new Promise<[number | null, NodeJS.Signals | null]>((settle, reject) => {
      child.on("error", reject);
      child.on("close", (...ended) => settle(ended));
      leave = () => {
        child.unref();
        settle([null, "SIGKILL"]);
      };
    });
    if (whyEnded !== undefined) throw hookError(program, phase, whyEnded);
    if (code !== 0) {
      throw hookError(
        program,
        phase,
        code === null ? `was ended by ${signal}` : `ended with exit code ${code}`,
      );
    }
  } catch (error) {
    throw ioError(`run the hook of ${phase}`, program, error);
  } finally {
    clearTimeout(timer);
    clearTimeout(killer);
    call.signal?.removeEventListener("abort", onAbort);
  }
}

function hookError(program: string, phase: Phase, problem: string): CowcatcherError {
  return new CowcatcherError({ code: "IO", object: program, problem: `the hook of ${phase} ${problem}` });
}
