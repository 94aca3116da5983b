// System calls on files, as promises: on the main thread through libuv's pool, in any other by blocking it.
//
// libuv has four threads for all threads of the process together. One that sits in a call to storage that does not
// answer is lost to everybody, and four of them stop the reads and writes of every guest whose disk is not in the page
// cache, or is open with O_DIRECT. So only what the main thread needs itself, the guests' own storage, may go there; a
// thread that was made for storage of another kind (backup/storage/thread.ts, the workers) serves nobody whom its
// waiting could harm, and waits itself.
//
// Names are as file-names.ts has them.

import * as fs from "node:fs";
import { promisify } from "node:util";
import { isMainThread } from "node:worker_threads";
import { decodeName, systemName } from "../../file-names.js";

/** One call in both forms. */
function either<Arguments extends unknown[], Result>(
  pooled: (...args: Arguments) => Promise<Result>,
  blocking: (...args: Arguments) => Result,
): (...args: Arguments) => Promise<Result> {
  if (isMainThread) return pooled;
  // eslint-disable-next-line @typescript-eslint/require-await -- what it throws becomes a rejection
  return async (...args) => blocking(...args);
}

type OpenFile = (path: string, flags: number, mode?: number) => Promise<number>;

const openPooled = promisify(fs.open) as (
  path: string | Buffer,
  flags: number,
  mode?: number,
) => Promise<number>;
export const openFile: OpenFile = either(
  (path, flags, mode) => openPooled(systemName(path), flags, mode),
  (path, flags, mode) => fs.openSync(systemName(path), flags, mode),
);
export const closeFile = either<[fd: number], void>(promisify(fs.close), (fd) => fs.closeSync(fd));
export const statPath = either<[path: string], fs.Stats>(
  (path) => fs.promises.stat(systemName(path)),
  (path) => fs.statSync(systemName(path)),
);
/** With whole 64-bit numbers. */
export const statPathExactly = either<[path: string], fs.BigIntStats>(
  (path) => fs.promises.stat(systemName(path), { bigint: true }),
  (path) => fs.statSync(systemName(path), { bigint: true }),
);
/** Of a name itself, be it a symbolic link. */
export const statName = either<[path: string], fs.BigIntStats>(
  (path) => fs.promises.lstat(systemName(path), { bigint: true }),
  (path) => fs.lstatSync(systemName(path), { bigint: true }),
);
const statFd: (fd: number, options: { bigint: true }) => Promise<fs.BigIntStats> = promisify(fs.fstat);
export const statFile = either<[fd: number], fs.BigIntStats>(
  (fd) => statFd(fd, { bigint: true }),
  (fd) => fs.fstatSync(fd, { bigint: true }),
);
/** Of the file system that the path leads to. */
export const statFileSystem = either<[path: string], fs.StatsFs>(
  (path) => fs.promises.statfs(systemName(path)),
  (path) => fs.statfsSync(systemName(path)),
);
const AS_BYTES = { encoding: "buffer" } as const;
export const realPath = either<[path: string], string>(
  async (path) => decodeName(await fs.promises.realpath(systemName(path), AS_BYTES)),
  (path) => decodeName(fs.realpathSync.native(systemName(path), AS_BYTES)),
);
export const readLink = either<[path: string], string>(
  async (path) => decodeName(await fs.promises.readlink(systemName(path), AS_BYTES)),
  (path) => decodeName(fs.readlinkSync(systemName(path), AS_BYTES)),
);
export const namesIn = either<[path: string], string[]>(
  async (path) => (await fs.promises.readdir(systemName(path), AS_BYTES)).map(decodeName),
  (path) => fs.readdirSync(systemName(path), AS_BYTES).map(decodeName),
);
export const readBytes = either<[path: string], Buffer>(
  (path) => fs.promises.readFile(systemName(path)),
  (path) => fs.readFileSync(systemName(path)),
);
export const syncFileData = either<[fd: number], void>(promisify(fs.fdatasync), (fd) => fs.fdatasyncSync(fd));
export const truncateFile = either<[fd: number, lengthBytes: number], void>(
  promisify(fs.ftruncate),
  (fd, lengthBytes) => fs.ftruncateSync(fd, lengthBytes),
);
export const changeMode = either<[fd: number, mode: number], void>(promisify(fs.fchmod), (fd, mode) =>
  fs.fchmodSync(fd, mode),
);
export const changeOwner = either<[fd: number, uid: number, gid: number], void>(
  promisify(fs.fchown),
  (fd, uid, gid) => fs.fchownSync(fd, uid, gid),
);
export const renameFile = either<[from: string, to: string], void>(
  (from, to) => fs.promises.rename(systemName(from), systemName(to)),
  (from, to) => fs.renameSync(systemName(from), systemName(to)),
);
/** A second name for the file that `from` names. */
export const linkFile = either<[from: string, to: string], void>(
  (from, to) => fs.promises.link(systemName(from), systemName(to)),
  (from, to) => fs.linkSync(systemName(from), systemName(to)),
);
export const unlinkFile = either<[path: string], void>(
  (path) => fs.promises.unlink(systemName(path)),
  (path) => fs.unlinkSync(systemName(path)),
);
