// Telling systemd that the service is ready (sd_notify(3)): one datagram to the Unix socket that NOTIFY_SOCKET names.
//
// Node has no Unix datagrams, so this binds four calls of the C library. Once a process, off every hot path.

import { CowcatcherError, ioError } from "../../errors.js";
import { errnoName } from "../../errno.js";
import { loadKoffi, missingKoffi } from "../../native/koffi.js";

const AF_UNIX = 1;
const SOCK_DGRAM = 2;
const SOCK_CLOEXEC = 0o2000000;
const MSG_NOSIGNAL = 0x4000;
/** struct sockaddr_un: two bytes of family, then the path. */
const SUN_PATH_BYTES = 108;

/**
 * Sends `state`, "READY=1" unless told otherwise. Returns false where no one asked to be told (no NOTIFY_SOCKET).
 * @throws CowcatcherError USAGE for an address that cannot be one, UNSUPPORTED without native calls, IO.
 */
export function notifyReady(state = "READY=1", environment: NodeJS.ProcessEnv = process.env): boolean {
  const address = environment["NOTIFY_SOCKET"];
  if (address === undefined || address === "") return false;
  const sockaddr = unixAddress(address);
  const isForbidden = environment["COWCATCHER_NO_NATIVE"] === "1" || process.platform !== "linux";
  if (isForbidden || missingKoffi() !== undefined) {
    throw new CowcatcherError({
      code: "UNSUPPORTED",
      object: address,
      problem: "cannot tell systemd that the service is ready without native calls",
      hint: "use Type=exec in the unit",
    });
  }
  send(address, sockaddr, Buffer.from(state));
  return true;
}

function unixAddress(address: string): Buffer {
  const path = Buffer.from(address);
  const isAbstract = address.startsWith("@");
  if ((!isAbstract && !address.startsWith("/")) || path.length >= SUN_PATH_BYTES) {
    throw new CowcatcherError({
      code: "USAGE",
      object: "NOTIFY_SOCKET",
      problem: `'${address}' is not the address of a Unix socket`,
      hint: `an absolute path or @name of less than ${SUN_PATH_BYTES} bytes`,
    });
  }
  if (isAbstract) path[0] = 0;
  const family = Buffer.from(new Uint16Array([AF_UNIX]).buffer);
  // An abstract name is as long as the address says; a path is ended by a zero byte.
  return Buffer.concat(isAbstract ? [family, path] : [family, path, Buffer.alloc(1)]);
}

function send(address: string, sockaddr: Buffer, message: Buffer): void {
  const koffi = loadKoffi();
  const library = koffi.load("libc.so.6");
  const socket = library.func("int socket(int domain, int type, int protocol)");
  const sendto = library.func(
    "int64_t sendto(int fd, const void *bytes, uint64_t length, int flags, const void *address, uint32_t addressLength)",
  );
  const close = library.func("int close(int fd)");
  const fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0) as number;
  if (fd < 0) throw failure("open a socket for", address, koffi.errno());
  try {
    const sent = sendto(fd, message, message.length, MSG_NOSIGNAL, sockaddr, sockaddr.length) as number;
    if (sent !== message.length) throw failure("notify", address, koffi.errno());
  } finally {
    close(fd);
  }
}

function failure(action: string, address: string, errno: number): CowcatcherError {
  const code = errnoName(errno);
  return ioError(action, address, Object.assign(new Error(code), { code }));
}
