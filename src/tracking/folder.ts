// The files of one disk's tracking. The interface is what the tracker needs of storage, and what the model test takes
// away from it: which of these calls outlive the process, and which the power's loss.
//
//   writeNow, write   survive the process (page cache), not the host, until a sync that began afterwards has ended
//   writeDurably      survives both once it is fulfilled (O_DSYNC)
//   replace           after it the new content is there whatever happens, before it the old one, and never a part

import * as fs from "node:fs";
import { join } from "node:path";
import { errnoOf, ioError } from "../errors.js";
import { systemName } from "../file-names.js";
import { acquireImageLock } from "../block/file/locks.js";
import { closeFile, openFile, syncFileData, writeFully, writeFullySync } from "../block/file/fileio.js";

export interface TrackingFile {
  /** Blocks its thread, for as long as the page cache takes. */
  writeNow(bytes: Uint8Array, from: number, to: number, offsetBytes: number): void;
  write(bytes: Uint8Array, from: number, to: number, offsetBytes: number): Promise<void>;
  writeDurably(bytes: Uint8Array, offsetBytes: number): Promise<void>;
  sync(): Promise<void>;
  close(): Promise<void>;
}

export interface TrackingFolder {
  /** What errors call it. */
  readonly name: string;
  /** Writing to it is as quick as to the image: it is on the same storage. */
  readonly isLocal: boolean;
  /** Null where there is no file of this name. */
  read(name: string): Promise<Uint8Array | null>;
  replace(name: string, bytes: Uint8Array): Promise<void>;
  /** The file must exist. */
  open(name: string): Promise<TrackingFile>;
  list(): Promise<string[]>;
  /** Nothing happens where there is none. */
  remove(name: string): Promise<void>;
  /** Of last change of the file's content, in ms since 1970; undefined where there is no such file. */
  changedMs(name: string): Promise<number | undefined>;
  close(): Promise<void>;
}

/** Of the folder beside an image. */
export const TRACKING_SUFFIX = ".cowcatcher";
const FOLDER_MODE = 0o700;
const FILE_MODE = 0o600;
export const LOCK_NAME = "lock";
const TEMPORARY_SUFFIX = ".new";

/** A folder of the file system. Main thread; all but `writeNow` runs in libuv's pool. */
export class FileFolder implements TrackingFolder {
  private constructor(
    readonly name: string,
    readonly isLocal: boolean,
    private readonly lockFd: number,
  ) {}

  /**
   * Makes the folder if need be, and locks it.
   * @param imageDevice number of the device that holds the image, where it is a file
   * @throws CowcatcherError LOCKED for a folder that another process tracks in; IO, NO_SPACE.
   */
  static async open(path: string, imageDevice: bigint | undefined): Promise<FileFolder> {
    let fd: number | undefined;
    try {
      await fs.promises.mkdir(systemName(path), { recursive: true, mode: FOLDER_MODE });
      await syncFolder(join(path, ".."));
      const { dev } = await fs.promises.stat(systemName(path), { bigint: true });
      fd = await openFile(join(path, LOCK_NAME), fs.constants.O_RDWR | fs.constants.O_CREAT, FILE_MODE);
      acquireImageLock(fd, path, { write: true });
      return new FileFolder(path, dev === imageDevice, fd);
    } catch (error) {
      if (fd !== undefined) await closeFile(fd);
      throw ioError("open the tracking folder", path, error);
    }
  }

  async read(name: string): Promise<Uint8Array | null> {
    return readIn(this.name, name);
  }

  async replace(name: string, bytes: Uint8Array): Promise<void> {
    const path = join(this.name, name);
    const temporary = path + TEMPORARY_SUFFIX;
    try {
      const { O_WRONLY, O_CREAT, O_TRUNC } = fs.constants;
      const fd = await openFile(temporary, O_WRONLY | O_CREAT | O_TRUNC, FILE_MODE);
      try {
        await writeFully(path, fd, bytes, 0, bytes.length, 0);
        await syncFileData(fd);
      } finally {
        await closeFile(fd);
      }
      await fs.promises.rename(systemName(temporary), systemName(path));
      await syncFolder(this.name);
    } catch (error) {
      throw ioError("write", path, error);
    }
  }

  async open(name: string): Promise<TrackingFile> {
    const path = join(this.name, name);
    const { O_RDWR, O_DSYNC } = fs.constants;
    const fds: number[] = [];
    try {
      fds.push(await openFile(path, O_RDWR), await openFile(path, O_RDWR | O_DSYNC));
    } catch (error) {
      await Promise.all(fds.map((fd) => closeFile(fd)));
      throw ioError("open", path, error);
    }
    const [fd = -1, durableFd = -1] = fds;
    return new FileOnDisk(path, fd, durableFd);
  }

  list(): Promise<string[]> {
    return listIn(this.name);
  }

  async remove(name: string): Promise<void> {
    const path = join(this.name, name);
    await fs.promises.rm(systemName(path), { force: true }).catch((error: unknown) => {
      throw ioError("remove", path, error);
    });
  }

  async changedMs(name: string): Promise<number | undefined> {
    const stats = await fs.promises.stat(systemName(join(this.name, name))).catch(() => undefined);
    return stats?.mtimeMs;
  }

  close(): Promise<void> {
    return closeFile(this.lockFd);
  }
}

class FileOnDisk implements TrackingFile {
  constructor(
    private readonly path: string,
    private readonly fd: number,
    private readonly durableFd: number,
  ) {}

  writeNow(bytes: Uint8Array, from: number, to: number, offsetBytes: number): void {
    writeFullySync(this.path, this.fd, bytes, from, to - from, offsetBytes);
  }

  write(bytes: Uint8Array, from: number, to: number, offsetBytes: number): Promise<void> {
    return writeFully(this.path, this.fd, bytes, from, to - from, offsetBytes);
  }

  writeDurably(bytes: Uint8Array, offsetBytes: number): Promise<void> {
    return writeFully(this.path, this.durableFd, bytes, 0, bytes.length, offsetBytes);
  }

  async sync(): Promise<void> {
    try {
      await syncFileData(this.fd);
    } catch (error) {
      throw ioError("sync", this.path, error);
    }
  }

  async close(): Promise<void> {
    await Promise.all([closeFile(this.fd), closeFile(this.durableFd)]);
  }
}

/** Of a folder that is only looked at: nothing is locked or made. @throws CowcatcherError IO */
export async function readIn(folder: string, name: string): Promise<Uint8Array | null> {
  const path = join(folder, name);
  try {
    return await fs.promises.readFile(systemName(path));
  } catch (error) {
    if (["ENOENT", "ENOTDIR"].includes(errnoOf(error) ?? "")) return null;
    throw ioError("read", path, error);
  }
}

async function listIn(folder: string): Promise<string[]> {
  try {
    return await fs.promises.readdir(systemName(folder));
  } catch (error) {
    throw ioError("list", folder, error);
  }
}

/** A name that was given or taken is durable then. Some file systems cannot sync a folder; theirs are so by themselves. */
async function syncFolder(path: string): Promise<void> {
  const fd = await openFile(path, fs.constants.O_RDONLY);
  try {
    await new Promise<void>((resolve, reject) => {
      fs.fsync(fd, (error) => {
        if (error === null || ["EINVAL", "ENOSYS"].includes(error.code ?? "")) resolve();
        else reject(error);
      });
    });
  } finally {
    await closeFile(fd);
  }
}
