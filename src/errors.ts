// The one place for errors: what they are called, what they carry, and how a user sees them.
//
// An error names its object (a file, an export, an option), the byte offset where there is one, what is wrong
// and what to do. The command line prints one line of it; the stack goes to the log at debug level.

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
  | "CANCELLED"
  | "WORKER" // a worker thread died
  | "VERIFY" // the target, read back, is not what was written to it
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

const NO_SPACE_ERRNOS = new Set(["ENOSPC", "EDQUOT", "EFBIG"]);

const ERRNO_TEXT: Record<string, string> = {
  EACCES: "permission denied",
  EPERM: "operation not permitted",
  ENOENT: "no such file or directory",
  EISDIR: "is a directory",
  ENOTDIR: "a part of the path is not a directory",
  ENOSPC: "no space left on the device",
  EDQUOT: "disk quota exceeded",
  EFBIG: "file too large for the file system",
  EIO: "input/output error",
  EROFS: "read-only file system",
  EEXIST: "exists already",
  EINVAL: "invalid argument",
  ENODEV: "no such device",
  ENXIO: "no such device or address",
  EMFILE: "too many open files",
  EADDRINUSE: "address in use",
  ECONNREFUSED: "connection refused",
  ENOMEM: "out of memory",
  ELOOP: "too many symbolic links",
  ENAMETOOLONG: "the name is too long",
  ETXTBSY: "the file is being executed",
  EBUSY: "in use",
  EADDRNOTAVAIL: "this machine does not have the address",
  ENOTFOUND: "no such host",
  ECONNRESET: "the other side ended the connection",
  EPIPE: "the other side ended the connection",
  ETIMEDOUT: "no answer in time",
  EHOSTUNREACH: "no way to that host",
  ENETUNREACH: "no way to that network",
};

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
  const reason = errno === undefined ? messageOf(cause) : (ERRNO_TEXT[errno] ?? errno);
  const code =
    errno !== undefined && NO_SPACE_ERRNOS.has(errno) ? "NO_SPACE" : errno === "ENOENT" ? "NOT_FOUND" : "IO";
  return new CowcatcherError({
    code,
    object,
    problem: `cannot ${action}: ${reason}`,
    hint: code === "NO_SPACE" ? "free space there, or choose another place" : undefined,
    offsetBytes,
    errno,
    cause,
  });
}

/** Any thrown value as a typed error; a bug in our own code becomes INTERNAL. */
export function toCowcatcherError(value: unknown, object = "cowcatcher"): CowcatcherError {
  if (value instanceof CowcatcherError) return value;
  if (errnoOf(value) !== undefined) return ioError("go on", object, value);
  return new CowcatcherError({ code: "INTERNAL", object, problem: messageOf(value), cause: value });
}

/** The errno name ("ENOENT") of whatever was thrown, where it has one. */
export function errnoOf(value: unknown): string | undefined {
  if (value instanceof CowcatcherError) return value.errno;
  if (typeof value !== "object" || value === null || !("code" in value)) return undefined;
  const { code } = value;
  return typeof code === "string" && /^E[A-Z0-9]+$/.test(code) ? code : undefined;
}

/** The text of whatever was thrown: an Error's message, else the value as text. */
export function messageOf(value: unknown): string {
  return value instanceof Error ? value.message : String(value);
}
