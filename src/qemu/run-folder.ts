// The folder of one run: the fleecing files, and the socket at which QEMU serves the snapshots. QEMU opens what is in
// it, so it belongs to QEMU's user; and nobody else may look at a guest's old data, so it is that user's and root's alone.
//
//   DIR/cowcatcher-PID.START/      mode 0700
//     0.fleece  1.fleece …         sparse, as long as the disks
//     nbd.sock                     QEMU's
//     ring.sock                    ours, by the method `ring`
//
// A folder whose process is gone is removed by the next run in DIR. Main thread; synchronous where noted: this process
// serves no guest while it does so.

import * as fs from "node:fs";
import { mkdir, readdir, rm, stat } from "node:fs/promises";
import { join } from "node:path";
import { CowcatcherError, ioError } from "../errors.js";
import { isAlive, runName, runOf } from "./names.js";

/** sun_path of Linux's sockaddr_un, less the final zero. */
const SOCKET_PATH_BYTES_MAX = 107;
const FOLDER_MODE = 0o700;
const FILE_MODE = 0o600;

/** A user, and its group. */
export interface Owner {
  uid: number;
  gid: number;
}

export class RunFolder {
  readonly run = runName();
  readonly path: string;
  /** In which it stands. */
  readonly directory: string;
  readonly #owner: Owner | undefined;

  private constructor(directory: string, path: string, owner: Owner | undefined) {
    this.directory = directory;
    this.path = path;
    this.#owner = owner;
  }

  /**
   * Makes the folder, for the user whose socket stands at `monitor`, after what dead runs have left in `directory`.
   * @throws CowcatcherError NOT_FOUND, IO, naming the folder; LIMIT for a path too long for a socket
   */
  static async create(directory: string, monitor: string): Promise<RunFolder> {
    return RunFolder.createFor(directory, await ownerOf(monitor));
  }

  /**
   * As `create`, for a user that is known; undefined: this process's own.
   * @throws CowcatcherError as create
   */
  static async createFor(directory: string, owner: Owner | undefined): Promise<RunFolder> {
    await removeDeadFolders(directory);
    const path = join(directory, runName());
    const folder = new RunFolder(directory, path, owner);
    if (Buffer.byteLength(folder.socket) > SOCKET_PATH_BYTES_MAX) {
      throw new CowcatcherError({
        code: "LIMIT",
        object: directory,
        problem: `its name is too long for a socket in it, whose path may have ${SOCKET_PATH_BYTES_MAX} bytes`,
        hint: "give another folder with --fleece-dir",
      });
    }
    try {
      await mkdir(path, { mode: FOLDER_MODE });
      folder.#giveTo(path);
    } catch (error) {
      throw ioError("make a folder for QEMU's files", path, error);
    }
    return folder;
  }

  /** Where QEMU listens. */
  get socket(): string {
    return join(this.path, "nbd.sock");
  }

  /** Where this process listens for old data (ring-keeper.ts). */
  get ringSocket(): string {
    return join(this.path, "ring.sock");
  }

  /** To QEMU's user. @throws the system's error */
  giveRingSocket(): void {
    this.#giveTo(this.ringSocket);
  }

  /** A new sparse file of that size, open for looking at it. Synchronous. @throws CowcatcherError */
  createFile(disk: number, sizeBytes: number): { path: string; fd: number } {
    const path = join(this.path, `${disk}.fleece`);
    try {
      const fd = fs.openSync(
        path,
        fs.constants.O_RDWR | fs.constants.O_CREAT | fs.constants.O_EXCL,
        FILE_MODE,
      );
      fs.ftruncateSync(fd, sizeBytes);
      this.#giveTo(path);
      return { path, fd };
    } catch (error) {
      throw ioError("make a fleecing file", path, error);
    }
  }

  #giveTo(path: string): void {
    if (this.#owner !== undefined) fs.chownSync(path, this.#owner.uid, this.#owner.gid);
  }

  /** @throws CowcatcherError IO */
  async remove(): Promise<void> {
    await removeFolder(this.path);
  }
}

/** Whose the monitor's socket is, where root has to give files away; undefined: this process's user runs QEMU, too. */
async function ownerOf(monitor: string): Promise<Owner | undefined> {
  if (process.getuid?.() !== 0) return undefined;
  const { uid, gid } = await stat(monitor).catch((error: unknown) => {
    throw ioError("find the monitor", monitor, error);
  });
  return uid === 0 ? undefined : { uid, gid };
}

/** What runs have left in the directory whose processes are gone. Never rejects: it is for the next one to say so. */
export async function removeDeadFolders(directory: string): Promise<void> {
  const names = await readdir(directory).catch(() => []);
  for (const name of names) {
    if (runOf(name) === name && !isAlive(name))
      await rm(join(directory, name), { recursive: true, force: true }).catch(() => undefined);
  }
}

async function removeFolder(path: string): Promise<void> {
  try {
    await rm(path, { recursive: true, force: true });
  } catch (error) {
    throw ioError("remove the folder", path, error);
  }
}
