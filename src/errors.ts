// The one place for errors: what they are called, what they carry, and how a user sees them.
//
// An error names its object (a file, an export, an option), the byte offset where there is one, what is wrong
// and what to do. The command line prints one line of it; the stack goes to the log at debug level.

import { errnoHint, errnoKind, errnoName, errnoText } from "./errno.js";
import { processLimit, type LimitName } from "./process-limits.js";

export type ErrorCode =
  | "USAGE" // the command line is wrong
  | "IO" // the operating system refused a read, a write, a flush
  | "NO_SPACE" // ENOSPC, EDQUOT, EFBIG
  | "FORMAT" // an image's bytes break its specification
  | "UNSUPPORTED" // a feature, named, that this version does not have
  | "LOCKED" // another program uses the image
  | "EXISTS" // the target is there and --force was not given
  | "NOT_FOUND"
  | "PROTOCOL" // a peer broke NBD's or QMP's rules
  | "BUSY" // the object has a job already
  | "BUFFER_FULL" // --on-buffer-full cancel, or the spill's limit
  | "GUEST_TIMEOUT" // a guest write waited for --guest-timeout
  | "SNAPSHOT" // another program could not keep the disk as it was
  | "CANCELLED"
  | "SERVER_ENDED" // the server that made the backup was ended by a signal or by quit
  | "WORKER" // a worker thread died
  | "VERIFY" // the target, read back, is not what was written to it
  | "NO_BASIS" // what an incremental backup builds on is missing: checkpoint, bitmap, base
  | "KEY" // no key, or the wrong one, for an encrypted repository
  | "LIMIT" // a stated bound was hit; the message names the bound
  | "INTERNAL";

export interface ErrorDetails {
  code: ErrorCode;
  /** What the error is about: a path, a URI, an export's or an option's name. */
  object: string;
  /** What is wrong, without the object, the offset and the advice. */
  problem: string;
  /** What the user can do. */
  hint?: string | undefined;
  /** Byte offset in `object` where it happened. */
  offsetBytes?: number | undefined;
  /** The system's error name, such as "EIO". */
  errno?: string | undefined;
  cause?: unknown;
}

/**
 * The one error that users see: what it is about, what is wrong, what to do. Any thread; crosses threads as
 * ErrorDetails.
 */
export class CowcatcherError extends Error {
  readonly code: ErrorCode;
  readonly object: string;
  readonly problem: string;
  readonly hint: string | undefined;
  readonly offsetBytes: number | undefined;
  readonly errno: string | undefined;

  constructor(details: ErrorDetails) {
    super(describe(details), details.cause === undefined ? undefined : { cause: details.cause });
    this.name = "CowcatcherError";
    this.code = details.code;
    this.object = details.object;
    this.problem = details.problem;
    this.hint = details.hint;
    this.offsetBytes = details.offsetBytes;
    this.errno = details.errno;
  }

  /** A form that survives a worker's message port and JSON; `fromDetails` is its inverse. */
  toDetails(): ErrorDetails {
    const { code, object, problem, hint, offsetBytes, errno } = this;
    return { code, object, problem, hint, offsetBytes, errno };
  }
}

function describe({ object, problem, hint, offsetBytes }: ErrorDetails): string {
  const where = offsetBytes === undefined ? "" : ` at offset ${offsetBytes}`;
  const advice = hint === undefined ? "" : ` (${hint})`;
  return `${object}: ${problem}${where}${advice}`;
}

const CODE_OF_KIND = {
  full: "NO_SPACE",
  missing: "NOT_FOUND",
  limit: "LIMIT",
  transient: "IO",
  lasting: "IO",
} as const;

/**
 * Whether the same call may go well the next time without anybody's doing. What has no errno may. A connection that finds no
 * socket (ENOENT, and an error of code IO all the same) may, too: its server is being started again.
 */
export function isTransient({ code, errno }: CowcatcherError): boolean {
  return code === "IO" && (errno === undefined || errno === "ENOENT" || errnoKind(errno) === "transient");
}

/**
 * Wraps what a system call threw (an error with `code` such as "EIO") into a typed error.
 * An error that is typed already is returned as it is, so that the first cause stays the one that is shown.
 */
export function ioError(
  action: string,
  object: string,
  cause: unknown,
  offsetBytes?: number,
): CowcatcherError {
  if (cause instanceof CowcatcherError) return cause;
  const errno = errnoOf(cause);
  const reason = errno === undefined ? messageOf(cause) : errnoText(errno);
  const code = errno === undefined ? "IO" : CODE_OF_KIND[errnoKind(errno)];
  return new CowcatcherError({
    code,
    object,
    problem: `cannot ${action}: ${reason}`,
    hint: errno === undefined ? undefined : hintOf(errno),
    offsetBytes,
    errno,
    cause,
  });
}

/** Where a limit of this process is hit its value is told, too. */
function hintOf(errno: string): string | undefined {
  if (errno === "EFBIG") return fileSizeHint();
  if (errno === "EMFILE") return openFilesHint();
  return errnoHint(errno);
}

function fileSizeHint(): string {
  const limitBytes = processLimit("Max file size");
  const limit =
    limitBytes === undefined
      ? "the file system's maximum for a file is reached"
      : `this process may write files of ${limitBytes} bytes at most: see ulimit -f`;
  return `${limit}; a qcow2 target takes only what its data takes, and can be compressed`;
}

function openFilesHint(): string {
  return `${countOf("Max open files")}raise RLIMIT_NOFILE, by ulimit -n or LimitNOFILE= of the systemd unit`;
}

function countOf(name: LimitName): string {
  const limit = processLimit(name);
  return limit === undefined ? "" : `this process may have ${limit}; `;
}

/**
 * What a thread that could not be started, or not load its modules, has died of: a limit that it names. Undefined where
 * it is something else.
 */
export function threadStartError(object: string, cause: unknown): CowcatcherError | undefined {
  // Node has the errno in the text alone, and what another thread threw loses its code on the way.
  const errno = /^(?:Worker initialization failure: )?(E[A-Z]+)\b/.exec(messageOf(cause))?.[1];
  if (errno !== "EMFILE" && errno !== "ENFILE" && errno !== "EAGAIN") return undefined;
  const known = ioError("start a thread", object, { code: errno });
  const hint =
    errno === "EAGAIN"
      ? `${countOf("Max processes")}raise RLIMIT_NPROC, by ulimit -u or LimitNPROC= of the systemd unit, or its TasksMax=`
      : known.hint;
  const problem = errno === "EAGAIN" ? "cannot start a thread: the system allows no more" : known.problem;
  return new CowcatcherError({ code: "LIMIT", object, problem, hint, errno, cause });
}

/**
 * What needs the working folder where that was removed: a relative name, and each thread of Node's as it starts.
 * Undefined where it is something else.
 */
export function workingFolderError(cause: unknown): CowcatcherError | undefined {
  // What another thread threw has its text alone.
  if (!/\buv_cwd$/.test(messageOf(cause))) return undefined;
  return removedFolder(cause);
}

export function removedFolder(cause?: unknown): CowcatcherError {
  return new CowcatcherError({
    code: "NOT_FOUND",
    object: "the working folder",
    problem: "was removed",
    hint: "start from a folder that is there, or give absolute paths",
    errno: "ENOENT",
    cause,
  });
}

/** Any thrown value as a typed error; a bug in our own code becomes INTERNAL. */
export function toCowcatcherError(value: unknown, object = "cowcatcher"): CowcatcherError {
  if (value instanceof CowcatcherError) return value;
  const ofFolder = workingFolderError(value);
  if (ofFolder !== undefined) return ofFolder;
  if (errnoOf(value) !== undefined) return ioError("go on", object, value);
  const ofThread = threadStartError(object, value);
  if (ofThread !== undefined) return ofThread;
  return new CowcatcherError({ code: "INTERNAL", object, problem: messageOf(value), cause: value });
}

/** The errno name ("ENOENT") of whatever was thrown, where it has one. */
export function errnoOf(value: unknown): string | undefined {
  if (value instanceof CowcatcherError) return value.errno;
  if (typeof value !== "object" || value === null || !("code" in value)) return undefined;
  const { code } = value;
  if (typeof code !== "string") return undefined;
  if (/^E(?!RR_)[A-Z0-9_]+$/.test(code)) return code;
  // "Unknown system error -122" is libuv's word for what it has no name for.
  const isUnnamed = code.startsWith("Unknown system error") && "errno" in value;
  return isUnnamed && typeof value.errno === "number" ? errnoName(value.errno) : undefined;
}

/** The text of whatever was thrown: an Error's message, else the value as text. */
export function messageOf(value: unknown): string {
  return value instanceof Error ? value.message : String(value);
}
