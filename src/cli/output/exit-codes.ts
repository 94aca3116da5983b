// Exit codes, in one place: what each number means, for which command, and which one an error leads to.
import { NO_CHECKS } from "../../block/format.js";
import type { CowcatcherError, ErrorCode } from "../../errors.js";

export const EXIT = {
  done: 0,
  failed: 1,
  usage: 2,
  ignoredErrors: 3,
  verifyDifference: 4,
  lockHeld: 10,
  wrongKey: 11,
  noBasis: 12,
  snapshotBroken: 13,
  interruptedBySighup: 129,
  interruptedBySigint: 130,
  interruptedBySigterm: 143,
} as const;

/** As qemu-img compare. */
export const COMPARE_EXIT = { same: 0, different: 1, error: 2 } as const;

/** As qemu-img check. */
export const CHECK_EXIT = { clean: 0, cannotCheck: 1, corrupt: 2, leaks: 3, noChecks: 63 } as const;

const INTERRUPT_EXIT = {
  SIGHUP: EXIT.interruptedBySighup,
  SIGINT: EXIT.interruptedBySigint,
  SIGTERM: EXIT.interruptedBySigterm,
} as const;

export type InterruptSignal = keyof typeof INTERRUPT_EXIT;

/** As a shell has it for a process that the signal ended. */
export function interruptExitCode(signal: InterruptSignal): number {
  return INTERRUPT_EXIT[signal];
}

export const COMMAND_NAMES = [
  "backup",
  "serve",
  "jobs",
  "checkpoints",
  "restore",
  "info",
  "map",
  "check",
  "compare",
  "create",
  "repo",
  "mount",
  "ls",
  "cat",
  "cp",
  "run",
  "bench",
] as const;
export type CommandName = (typeof COMMAND_NAMES)[number];

type ExitMeaning = readonly [code: number, meaning: string];

const COMMON: readonly ExitMeaning[] = [
  [EXIT.done, "done"],
  [EXIT.failed, "failed"],
  [EXIT.usage, "wrong usage"],
];

const WRONG_KEY: ExitMeaning = [EXIT.wrongKey, "no key, or the wrong one, for an encrypted repository"];

const COPY: readonly ExitMeaning[] = [
  ...COMMON,
  [EXIT.ignoredErrors, "done, but errors were ignored as asked"],
  [EXIT.verifyDifference, "the check after writing (--verify) found a difference"],
  WRONG_KEY,
  [EXIT.noBasis, "what an incremental backup builds on cannot be used"],
  [EXIT.interruptedBySighup, "interrupted by SIGHUP, the terminal being gone; an unfinished file is removed"],
  [EXIT.interruptedBySigint, "interrupted by SIGINT; an unfinished file is removed"],
  [EXIT.interruptedBySigterm, "interrupted by SIGTERM; an unfinished file is removed"],
];

const BACKUP: readonly ExitMeaning[] = [
  ...COPY,
  [EXIT.noBasis, "what it builds on is missing: the checkpoint of --since"],
  [
    EXIT.snapshotBroken,
    "the guest's old data could not be kept (buffer or spill at its limit, guest's time limit)",
  ],
];

const FILES: readonly ExitMeaning[] = [
  ...COMMON,
  WRONG_KEY,
  [EXIT.interruptedBySigint, "interrupted by SIGINT"],
  [EXIT.interruptedBySigterm, "interrupted by SIGTERM"],
];

const MEANINGS: Record<CommandName, readonly ExitMeaning[]> = {
  backup: BACKUP,
  restore: COPY,
  serve: [
    [EXIT.done, "ended by SIGINT or SIGTERM, in good order"],
    ...COMMON.slice(1),
    [EXIT.interruptedBySigint, "a second SIGINT: ended at once"],
    [EXIT.interruptedBySigterm, "a second SIGTERM: ended at once"],
  ],
  jobs: COMMON,
  checkpoints: [...COMMON, [EXIT.noBasis, "no such checkpoint"]],
  info: [...COMMON, WRONG_KEY],
  map: [...COMMON, WRONG_KEY],
  create: COMMON,
  repo: [
    ...COMMON,
    [EXIT.verifyDifference, "verify found damage"],
    WRONG_KEY,
    [EXIT.interruptedBySigint, "interrupted by SIGINT"],
    [EXIT.interruptedBySigterm, "interrupted by SIGTERM"],
  ],
  mount: [
    [EXIT.done, "ended by SIGINT, SIGTERM or an unmount, in good order"],
    ...COMMON.slice(1),
    WRONG_KEY,
    [EXIT.interruptedBySigint, "a second SIGINT: ended at once"],
    [EXIT.interruptedBySigterm, "a second SIGTERM: ended at once"],
  ],
  ls: FILES,
  cat: FILES,
  cp: FILES,
  run: [
    [EXIT.done, "all jobs done, or skipped"],
    [EXIT.failed, "a job failed"],
    [EXIT.usage, "wrong usage, or a wrong job file"],
    [EXIT.ignoredErrors, "done, but errors were ignored as asked"],
    [EXIT.verifyDifference, "a backup is damaged"],
    [EXIT.lockHeld, "another run has the disk or the repository, or another backup the source"],
    WRONG_KEY,
    [EXIT.noBasis, "level: incremental, and what it builds on is missing"],
    [EXIT.snapshotBroken, "the guest's old data could not be kept"],
    [EXIT.interruptedBySighup, "interrupted by SIGHUP"],
    [EXIT.interruptedBySigint, "interrupted by SIGINT"],
    [EXIT.interruptedBySigterm, "interrupted by SIGTERM"],
  ],
  bench: [
    ...COMMON,
    [EXIT.interruptedBySighup, "interrupted by SIGHUP; what it made is removed"],
    [EXIT.interruptedBySigint, "interrupted by SIGINT; what it made is removed"],
    [EXIT.interruptedBySigterm, "interrupted by SIGTERM; what it made is removed"],
  ],
  check: [
    [CHECK_EXIT.clean, "clean"],
    [CHECK_EXIT.cannotCheck, "cannot check (wrong usage, too)"],
    [CHECK_EXIT.corrupt, "corrupt"],
    [CHECK_EXIT.leaks, "leaks, but no harm to data"],
    [CHECK_EXIT.noChecks, "the image's format has nothing to check: raw images, and exports"],
  ],
  compare: [
    [COMPARE_EXIT.same, "the same content"],
    [COMPARE_EXIT.different, "different content"],
    [COMPARE_EXIT.error, "cannot compare, or wrong usage"],
  ],
};

/** The lines of --help that list a command's exit codes. */
export function exitCodesHelp(command: CommandName): string {
  const lines = MEANINGS[command].map(([code, meaning]) => `  ${String(code).padEnd(4)} ${meaning}`);
  return ["Exit codes:", ...lines].join("\n");
}

/** The disk could not be kept as it was at T0. */
const SNAPSHOT_CODES: ReadonlySet<ErrorCode> = new Set(["BUFFER_FULL", "GUEST_TIMEOUT", "SNAPSHOT"]);

/** The exit code of a command that ended with `error`; `undefined` for the command where none was recognised. */
export function exitCodeOfError(command: CommandName | undefined, error: CowcatcherError): number {
  // A script takes check's 2 for a corrupt image, so a mistyped option must not lead to it.
  if (command === "check") return error.problem === NO_CHECKS ? CHECK_EXIT.noChecks : CHECK_EXIT.cannotCheck;
  if (command === "compare") return COMPARE_EXIT.error;
  if (error.code === "VERIFY") return EXIT.verifyDifference;
  if (error.code === "NO_BASIS") return EXIT.noBasis;
  if (error.code === "KEY") return EXIT.wrongKey;
  if (SNAPSHOT_CODES.has(error.code)) return EXIT.snapshotBroken;
  return error.code === "USAGE" ? EXIT.usage : EXIT.failed;
}
