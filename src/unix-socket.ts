// Listening on a Unix socket's path, for the control socket and for NBD.
//
// The file is bound under a umask that gives it the mode asked for, so that no moment exists in which others could
// connect. A file that is left over from a server that is gone (a connection is refused) is replaced; one that
// answers, or that is no socket, is left alone. Main thread only: the umask is the process's.

import { chmodSync, chownSync, existsSync, lstatSync, realpathSync, unlinkSync } from "node:fs";
import { connect, type Server } from "node:net";
import { basename, dirname, isAbsolute, join } from "node:path";
import { CowcatcherError, errnoOf, ioError } from "./errors.js";

/** sun_path holds 108 bytes with the final NUL; longer ones would be cut silently. */
const MAX_PATH_BYTES = 107;
const OWNER_MODE = 0o600;
/** Of a socket that is given to a group, where no mode is asked for. */
const GROUP_MODE = 0o660;
/** A stale socket refuses at once; a live but busy server may take a moment. */
const LIVENESS_TIMEOUT_MS = 2_000;

export interface UnixSocketOptions {
  /** Permission bits of the socket's file; undefined: what the process's umask leaves. */
  mode?: number | undefined;
  /** Group id of the socket's file; undefined: the process's own. */
  groupId?: number | undefined;
  backlog?: number | undefined;
}

/**
 * Makes `server` listen at `path`.
 * @throws CowcatcherError BUSY if another program listens there, EXISTS if another kind of file is there, LIMIT
 *   for a path that is too long, IO.
 */
export async function listenAtPath(
  server: Server,
  path: string,
  options: UnixSocketOptions = {},
): Promise<void> {
  checkPath(path);
  removeWhenClosed(server, path);
  try {
    await bind(server, path, options);
  } catch (cause) {
    refuseMissingFolder(path, cause);
    if (errnoOf(cause) !== "EADDRINUSE") throw ioError("listen on", path, cause);
    await removeStaleSocket(path);
    await bind(server, path, options).catch((again: unknown) => {
      throw ioError("listen on", path, again);
    });
  }
}

/** libuv removes the file by the name that it was given, which means another one when the working folder has been left. */
function removeWhenClosed(server: Server, path: string): void {
  if (isAbsolute(path)) return;
  server.once("listening", () => {
    // Through folders that are there now, and may be removed later.
    const file = join(realpathSync(dirname(path)), basename(path));
    const id = fileId(file);
    server.once("close", () => {
      if (id !== undefined && fileId(file) === id) unlinkSync(file);
    });
  });
}

function fileId(path: string): bigint | undefined {
  return lstatSync(path, { bigint: true, throwIfNoEntry: false })?.ino;
}

/** libuv calls a folder that is not there EACCES, as Windows does. */
function refuseMissingFolder(path: string, cause: unknown): void {
  const folder = dirname(path);
  if (errnoOf(cause) !== "EACCES" || existsSync(folder)) return;
  throw new CowcatcherError({
    code: "NOT_FOUND",
    object: path,
    problem: `the folder ${folder} does not exist`,
    hint: "create it first",
    cause,
  });
}

function bind(server: Server, path: string, { mode, groupId, backlog }: UnixSocketOptions): Promise<void> {
  return new Promise((resolve, reject) => {
    server.once("error", reject);
    // A group's bits are meant for that group alone, so they come when the file is that group's.
    const firstMode = groupId === undefined ? mode : OWNER_MODE;
    const umask = firstMode === undefined ? undefined : process.umask(~firstMode & 0o777);
    try {
      // The socket file is made before listen() returns; only the callback comes later.
      server.listen({ path, ...(backlog !== undefined && { backlog }) }, () => {
        server.off("error", reject);
        try {
          if (groupId !== undefined) giveToGroup(path, groupId, mode ?? GROUP_MODE);
          resolve();
        } catch (error) {
          server.close();
          reject(error instanceof Error ? error : new Error(String(error)));
        }
      });
    } finally {
      if (umask !== undefined) process.umask(umask);
    }
  });
}

function giveToGroup(path: string, groupId: number, mode: number): void {
  try {
    chownSync(path, -1, groupId);
    chmodSync(path, mode);
  } catch (error) {
    throw ioError(`give the socket to the group ${groupId}`, path, error);
  }
}

function checkPath(path: string): void {
  if (path !== "" && !path.includes("\0") && Buffer.byteLength(path) <= MAX_PATH_BYTES) return;
  throw new CowcatcherError({
    code: "LIMIT",
    object: path,
    problem: `a Unix socket's path has 1 to ${MAX_PATH_BYTES} bytes`,
    hint: "choose a shorter path",
  });
}

/** @throws CowcatcherError unless a socket file was there that nobody listens on, and is gone now. */
async function removeStaleSocket(path: string): Promise<void> {
  try {
    if (!lstatSync(path).isSocket()) {
      throw new CowcatcherError({
        code: "EXISTS",
        object: path,
        problem: "exists and is not a socket",
        hint: "choose another path",
      });
    }
    if (await answers(path)) {
      throw new CowcatcherError({
        code: "BUSY",
        object: path,
        problem: "another process listens there",
        hint: "end it, or choose another path",
      });
    }
    unlinkSync(path);
  } catch (cause) {
    // Gone meanwhile: as good as removed.
    if (errnoOf(cause) !== "ENOENT") throw ioError("replace the socket", path, cause);
  }
}

/** Only a refused connection shows that nobody listens; any other trouble is taken for a living server. */
function answers(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const probe = connect(path);
    const answer = (isLive: boolean): void => {
      probe.destroy();
      resolve(isLive);
    };
    probe.setTimeout(LIVENESS_TIMEOUT_MS, () => {
      answer(true);
    });
    probe.once("connect", () => {
      answer(true);
    });
    probe.once("error", (error) => {
      const errno = errnoOf(error);
      answer(errno !== "ECONNREFUSED" && errno !== "ENOENT");
    });
  });
}
