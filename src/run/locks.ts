// One run at a time for a disk and for a repository, on this machine.
//
// A lock is an open-file-description lock (fcntl(2), F_OFD_SETLK) on a file of its own, which stays there: to remove it would
// let two holders lock two files of one name. The kernel gives it back when the last process that has the file open is
// gone, so that none is left over after a crash; a backup's process has it open, too (child.ts). Within this process
// jobs wait for each other in any case; another process's lock is waited for as long as the job says.
//
// Without native calls there are no such locks: the images' own locks, and a server's one job a disk, still hold.
import { createHash } from "node:crypto";
import { type FileHandle, mkdir, open } from "node:fs/promises";
import { constants, homedir } from "node:os";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { CowcatcherError, ioError } from "../errors.js";
import { F_WRLCK, libc } from "../native/libc.js";

const POLL_MS = 500;
const BUSY = new Set([-constants.errno.EAGAIN, -constants.errno.EACCES]);

/** The folder for locks of this user. */
export function lockFolder(environment: Record<string, string | undefined> = process.env): string {
  if (process.getuid?.() === 0) return "/run/lock/cowcatcher";
  // Not the session's runtime folder: cron has none, and both must find the same one.
  return join(environment["XDG_CACHE_HOME"] || join(homedir(), ".cache"), "cowcatcher", "locks");
}

export interface HeldLocks {
  /** For children: the locks hold as long as one of these is open anywhere. */
  readonly descriptors: readonly number[];
  release(): Promise<void>;
}

export class Locks {
  /** By key, the end of the job of this process that has it. */
  readonly #own = new Map<string, Promise<void>>();

  constructor(private readonly folder: string) {}

  /**
   * Takes all, in one order for everybody, so that no two wait for each other.
   * @param keys what is locked, in words: they are shown
   * @throws CowcatcherError LOCKED where another process has one of them after waitMs; CANCELLED; IO.
   */
  async take(keys: readonly string[], waitMs: number, signal?: AbortSignal): Promise<HeldLocks> {
    const sorted = [...new Set(keys)].sort();
    const files: FileHandle[] = [];
    const ends: (() => void)[] = [];
    const release = async (): Promise<void> => {
      for (const file of files.splice(0)) await file.close();
      for (const end of ends.splice(0)) end();
    };
    try {
      for (const key of sorted) {
        for (let other = this.#own.get(key); other !== undefined; other = this.#own.get(key)) await other;
        ends.push(this.#mark(key));
        files.push(await this.#lock(key, performance.now() + waitMs, signal));
      }
      return { descriptors: files.map(({ fd }) => fd), release };
    } catch (error) {
      await release();
      throw error;
    }
  }

  #mark(key: string): () => void {
    let end: () => void = () => undefined;
    this.#own.set(
      key,
      new Promise<void>((settle) => {
        end = () => {
          this.#own.delete(key);
          settle();
        };
      }),
    );
    return end;
  }

  async #lock(key: string, untilMs: number, signal: AbortSignal | undefined): Promise<FileHandle> {
    const path = join(this.folder, `${createHash("sha256").update(key).digest("hex").slice(0, 32)}.lock`);
    let file: FileHandle;
    try {
      await mkdir(this.folder, { recursive: true, mode: 0o700 });
      file = await open(path, "a+", 0o600);
    } catch (error) {
      throw ioError("open the lock file", path, error);
    }
    try {
      while (!isLocked(file.fd, path)) {
        if (signal?.aborted === true) throw cancelled(key);
        if (performance.now() >= untilMs) throw heldElsewhere(key);
        await delay(Math.min(POLL_MS, Math.max(1, untilMs - performance.now())), undefined, { signal }).catch(
          () => {
            throw cancelled(key);
          },
        );
      }
      return file;
    } catch (error) {
      await file.close();
      throw error;
    }
  }
}

/** Whether it is ours now, or nobody can have one here. */
function isLocked(fd: number, path: string): boolean {
  if (libc === null) return true;
  const result = libc.ofdLock(fd, F_WRLCK, 0, 1);
  if (result >= 0) return true;
  if (BUSY.has(result)) return false;
  throw new CowcatcherError({ code: "IO", object: path, problem: `cannot be locked (errno ${-result})` });
}

function heldElsewhere(key: string): CowcatcherError {
  return new CowcatcherError({
    code: "LOCKED",
    object: key,
    problem: "another run has it",
    hint: "wait until it is over, or give `lock-wait`",
  });
}

function cancelled(key: string): CowcatcherError {
  return new CowcatcherError({
    code: "CANCELLED",
    object: key,
    problem: "interrupted while waiting for the lock",
  });
}
