// The system calls of a folder store, in two ways: at once, for a worker, which has nothing else to do meanwhile and
// must not fill the process's few pool threads, on which a guest's reads may wait; and through that pool, for a main
// thread that serves a guest.

import * as fs from "node:fs";
import { promisify } from "node:util";

type MaybePromise<T> = T | Promise<T>;

export interface FileCalls {
  open(path: string, flags: string | number): MaybePromise<number>;
  write(fd: number, bytes: Uint8Array, offset: number, length: number): MaybePromise<number>;
  read(fd: number, bytes: Uint8Array, offset: number, length: number, position: number): MaybePromise<number>;
  fdatasync(fd: number): MaybePromise<void>;
  fsync(fd: number): MaybePromise<void>;
  fstat(fd: number): MaybePromise<fs.Stats>;
  close(fd: number): MaybePromise<void>;
  /** Undefined: not there. */
  stat(path: string): MaybePromise<fs.Stats | undefined>;
  rename(from: string, to: string): MaybePromise<void>;
  link(from: string, to: string): MaybePromise<void>;
  unlink(path: string): MaybePromise<void>;
  rmdir(path: string): MaybePromise<void>;
  /** With the folders above it. @returns the uppermost that was made */
  mkdir(path: string): MaybePromise<string | undefined>;
  readdir(path: string): MaybePromise<fs.Dirent[]>;
  /** What kind of file system the path is on: statfs(2)'s f_type. */
  fileSystemType(path: string): MaybePromise<number>;
}

export const BLOCKING_CALLS: FileCalls = {
  open: (path, flags) => fs.openSync(path, flags, 0o666),
  write: (fd, bytes, offset, length) => fs.writeSync(fd, bytes, offset, length),
  read: (fd, bytes, offset, length, position) => fs.readSync(fd, bytes, offset, length, position),
  fdatasync: fs.fdatasyncSync,
  fsync: fs.fsyncSync,
  fstat: (fd) => fs.fstatSync(fd),
  close: fs.closeSync,
  stat: (path) => fs.statSync(path, { throwIfNoEntry: false }),
  rename: fs.renameSync,
  link: fs.linkSync,
  unlink: fs.unlinkSync,
  rmdir: (path) => fs.rmdirSync(path),
  mkdir: (path) => fs.mkdirSync(path, { recursive: true }),
  readdir: (path) => fs.readdirSync(path, { withFileTypes: true }),
  fileSystemType: (path) => fs.statfsSync(path).type,
};

const open = promisify(fs.open) as (path: string, flags: string | number, mode: number) => Promise<number>;
const write = promisify(fs.write);
const read = promisify(fs.read);

export const POOLED_CALLS: FileCalls = {
  open: (path, flags) => open(path, flags, 0o666),
  write: async (fd, bytes, offset, length) => (await write(fd, bytes, offset, length, null)).bytesWritten,
  read: async (fd, bytes, offset, length, position) =>
    (await read(fd, bytes, offset, length, position)).bytesRead,
  fdatasync: promisify(fs.fdatasync),
  fsync: promisify(fs.fsync),
  fstat: promisify(fs.fstat),
  close: promisify(fs.close),
  stat: async (path) => {
    try {
      return await fs.promises.stat(path);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
      throw error;
    }
  },
  rename: fs.promises.rename,
  link: fs.promises.link,
  unlink: fs.promises.unlink,
  rmdir: (path) => fs.promises.rmdir(path),
  mkdir: (path) => fs.promises.mkdir(path, { recursive: true }),
  readdir: (path) => fs.promises.readdir(path, { withFileTypes: true }),
  fileSystemType: async (path) => (await fs.promises.statfs(path)).type,
};
