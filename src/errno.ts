// Every errno of Linux: its name, its words, and what it means for whoever gets it. Node's own table (libuv's) lacks
// many, such as EDQUOT and ESTALE, and calls them "Unknown system error -122".
//
// Numbers are those of the kernel's include/uapi/asm-generic/errno.h and errno-base.h, which x86-64, arm64 and riscv64
// share. 41 and 58 are other names' numbers, and so are EWOULDBLOCK, EDEADLOCK and EOPNOTSUPP, which have no line.
//
//   transient   it may go well the next time without anybody's doing: worth a few tries
//   full        there is no room, and there will be none until somebody acts
//   limit       the process's or the system's
//   missing     what was named is not there

type Kind = "transient" | "full" | "limit" | "missing" | "lasting";

interface Errno {
  readonly number: number;
  readonly text: string;
  readonly kind: Kind;
  /** What the user can do, where there is something to say that is true wherever it happens. */
  readonly hint: string | undefined;
}

const HINTS: Readonly<Record<string, string>> = {
  ENOSPC: "free space there, or choose another place",
  EDQUOT: "free space of that user or group, raise the quota, or choose another place",
  ESTALE: "mount it again, then start again",
  EMFILE: "raise ulimit -n",
  ENFILE: "raise the sysctl fs.file-max",
  EUCLEAN: "run fsck",
};

const LINES: readonly (readonly [number: number, name: string, text: string, kind?: Kind])[] = [
  [1, "EPERM", "operation not permitted"],
  [2, "ENOENT", "no such file or directory", "missing"],
  [3, "ESRCH", "no such process"],
  [4, "EINTR", "interrupted system call", "transient"],
  [5, "EIO", "input/output error", "transient"],
  [6, "ENXIO", "no such device or address"],
  [7, "E2BIG", "argument list too long"],
  [8, "ENOEXEC", "exec format error"],
  [9, "EBADF", "the file is not open that way"],
  [10, "ECHILD", "no child processes"],
  [11, "EAGAIN", "not now: try again", "transient"],
  [12, "ENOMEM", "out of memory", "transient"],
  [13, "EACCES", "permission denied"],
  [14, "EFAULT", "bad address"],
  [15, "ENOTBLK", "is no block device"],
  [16, "EBUSY", "in use", "transient"],
  [17, "EEXIST", "exists already"],
  [18, "EXDEV", "the two places are on different file systems"],
  [19, "ENODEV", "no such device"],
  [20, "ENOTDIR", "a part of the path is not a directory"],
  [21, "EISDIR", "is a directory"],
  [22, "EINVAL", "invalid argument"],
  [23, "ENFILE", "too many open files in the system", "limit"],
  [24, "EMFILE", "too many open files", "limit"],
  [25, "ENOTTY", "inappropriate ioctl for device"],
  [26, "ETXTBSY", "the file is being executed"],
  [27, "EFBIG", "file too large", "full"],
  [28, "ENOSPC", "no space left on the device", "full"],
  [29, "ESPIPE", "illegal seek"],
  [30, "EROFS", "read-only file system"],
  [31, "EMLINK", "too many links"],
  [32, "EPIPE", "the other side ended the connection", "transient"],
  [33, "EDOM", "numerical argument out of domain"],
  [34, "ERANGE", "numerical result out of range"],
  [35, "EDEADLK", "resource deadlock avoided", "transient"],
  [36, "ENAMETOOLONG", "the name is too long"],
  [37, "ENOLCK", "no locks to be had there", "transient"],
  [38, "ENOSYS", "the system does not have that call"],
  [39, "ENOTEMPTY", "directory not empty"],
  [40, "ELOOP", "too many symbolic links"],
  [42, "ENOMSG", "no message of desired type"],
  [43, "EIDRM", "identifier removed"],
  [44, "ECHRNG", "channel number out of range"],
  [45, "EL2NSYNC", "level 2 not synchronized"],
  [46, "EL3HLT", "level 3 halted"],
  [47, "EL3RST", "level 3 reset"],
  [48, "ELNRNG", "link number out of range"],
  [49, "EUNATCH", "protocol driver not attached"],
  [50, "ENOCSI", "no CSI structure available"],
  [51, "EL2HLT", "level 2 halted"],
  [52, "EBADE", "invalid exchange"],
  [53, "EBADR", "invalid request descriptor"],
  [54, "EXFULL", "exchange full"],
  [55, "ENOANO", "no anode"],
  [56, "EBADRQC", "invalid request code"],
  [57, "EBADSLT", "invalid slot"],
  [59, "EBFONT", "bad font file format"],
  [60, "ENOSTR", "device not a stream"],
  [61, "ENODATA", "no data available"],
  [62, "ETIME", "timer expired", "transient"],
  [63, "ENOSR", "out of streams resources", "transient"],
  [64, "ENONET", "machine is not on the network", "transient"],
  [65, "ENOPKG", "package not installed"],
  [66, "EREMOTE", "object is remote"],
  [67, "ENOLINK", "the link to the server is severed", "transient"],
  [68, "EADV", "advertise error"],
  [69, "ESRMNT", "srmount error"],
  [70, "ECOMM", "communication error on send", "transient"],
  [71, "EPROTO", "protocol error", "transient"],
  [72, "EMULTIHOP", "multihop attempted"],
  [73, "EDOTDOT", "RFS specific error"],
  [74, "EBADMSG", "bad message"],
  [75, "EOVERFLOW", "value too large for defined data type"],
  [76, "ENOTUNIQ", "name not unique on network"],
  [77, "EBADFD", "file descriptor in bad state"],
  [78, "EREMCHG", "remote address changed"],
  [79, "ELIBACC", "can not access a needed shared library"],
  [80, "ELIBBAD", "accessing a corrupted shared library"],
  [81, "ELIBSCN", ".lib section in a.out corrupted"],
  [82, "ELIBMAX", "attempting to link in too many shared libraries"],
  [83, "ELIBEXEC", "cannot exec a shared library directly"],
  [84, "EILSEQ", "invalid or incomplete multibyte or wide character"],
  [85, "ERESTART", "interrupted system call should be restarted", "transient"],
  [86, "ESTRPIPE", "streams pipe error", "transient"],
  [87, "EUSERS", "too many users", "transient"],
  [88, "ENOTSOCK", "socket operation on non-socket"],
  [89, "EDESTADDRREQ", "destination address required"],
  [90, "EMSGSIZE", "message too long"],
  [91, "EPROTOTYPE", "protocol wrong type for socket"],
  [92, "ENOPROTOOPT", "protocol not available"],
  [93, "EPROTONOSUPPORT", "protocol not supported"],
  [94, "ESOCKTNOSUPPORT", "socket type not supported"],
  [95, "ENOTSUP", "not supported there"],
  [96, "EPFNOSUPPORT", "protocol family not supported"],
  [97, "EAFNOSUPPORT", "address family not supported by protocol"],
  [98, "EADDRINUSE", "address in use"],
  [99, "EADDRNOTAVAIL", "this machine does not have the address"],
  [100, "ENETDOWN", "the network is down", "transient"],
  [101, "ENETUNREACH", "no way to that network", "transient"],
  [102, "ENETRESET", "network dropped connection on reset", "transient"],
  [103, "ECONNABORTED", "the connection was broken off", "transient"],
  [104, "ECONNRESET", "the other side ended the connection", "transient"],
  [105, "ENOBUFS", "no buffer space available", "transient"],
  [106, "EISCONN", "transport endpoint is already connected"],
  [107, "ENOTCONN", "not connected", "transient"],
  [108, "ESHUTDOWN", "the other side is shutting down", "transient"],
  [109, "ETOOMANYREFS", "too many references: cannot splice"],
  [110, "ETIMEDOUT", "no answer in time", "transient"],
  [111, "ECONNREFUSED", "connection refused", "transient"],
  [112, "EHOSTDOWN", "that host is down", "transient"],
  [113, "EHOSTUNREACH", "no way to that host", "transient"],
  [114, "EALREADY", "operation already in progress", "transient"],
  [115, "EINPROGRESS", "operation now in progress", "transient"],
  [116, "ESTALE", "stale file handle: the server has lost the file, or it was replaced there"],
  [117, "EUCLEAN", "the file system is damaged"],
  [118, "ENOTNAM", "not a XENIX named type file"],
  [119, "ENAVAIL", "no XENIX semaphores available"],
  [120, "EISNAM", "is a named type file"],
  [121, "EREMOTEIO", "input/output error on the other side", "transient"],
  [122, "EDQUOT", "disk quota exceeded", "full"],
  [123, "ENOMEDIUM", "no medium in the drive"],
  [124, "EMEDIUMTYPE", "wrong medium type"],
  [125, "ECANCELED", "operation canceled"],
  [126, "ENOKEY", "required key not available"],
  [127, "EKEYEXPIRED", "key has expired"],
  [128, "EKEYREVOKED", "key has been revoked"],
  [129, "EKEYREJECTED", "key was rejected by service"],
  [130, "EOWNERDEAD", "owner died"],
  [131, "ENOTRECOVERABLE", "state not recoverable"],
  [132, "ERFKILL", "operation not possible due to RF-kill"],
  [133, "EHWPOISON", "a page of memory is broken"],
];

/** Of the resolver and of TLS, which Node gives names like an errno's. They have no number. */
const OTHER_TEXTS: Readonly<Record<string, string>> = {
  ENOTFOUND: "no such host",
  EAI_AGAIN: "the name server does not answer",
  EPROTO: "the other side breaks the protocol",
};

const ALIASES: Readonly<Record<string, string>> = {
  EWOULDBLOCK: "EAGAIN",
  EDEADLOCK: "EDEADLK",
  EOPNOTSUPP: "ENOTSUP",
};

const byName = new Map<string, Errno>(
  LINES.map(([number, name, text, kind = "lasting"]) => [name, { number, text, kind, hint: HINTS[name] }]),
);
const nameByNumber = new Map<number, string>(LINES.map(([number, name]) => [number, name]));

function find(name: string): Errno | undefined {
  return byName.get(ALIASES[name] ?? name);
}

/** "EDQUOT" of 122 or -122, as Node has them; "E122" style names for what the kernel may get some day. */
export function errnoName(number: number): string {
  const positive = Math.abs(number);
  return nameByNumber.get(positive) ?? `E${positive}`;
}

export function isErrnoName(name: string): boolean {
  return find(name) !== undefined;
}

/** What the name means, in words; the name itself where it is not known. */
export function errnoText(name: string): string {
  return OTHER_TEXTS[name] ?? find(name)?.text ?? name;
}

export function errnoHint(name: string): string | undefined {
  return find(name)?.hint;
}

export function errnoKind(name: string): Kind {
  return find(name)?.kind ?? "lasting";
}
