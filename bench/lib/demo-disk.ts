// The demo's disk: a sparse raw image with what a small machine's disk holds, in turns of files, random data (as
// compressed or encrypted files are) and nothing.

import { randomFillSync } from "node:crypto";
import { closeSync, ftruncateSync, openSync, readSync, readdirSync, statSync, writeSync } from "node:fs";
import { dirname, join } from "node:path";
import { ioError } from "../../src/errors.js";
import { MiB } from "../../src/units.js";

const REGION_BYTES = 8 * MiB;
/** What region i holds: i modulo this length. */
const TURNS = ["files", "empty", "files", "random", "files", "empty", "empty", "files"] as const;
/** A folder tree may be huge: no more files than this are looked at. */
const MAX_FILES = 20_000;

export interface DemoDisk {
  fileBytes: number;
  randomBytes: number;
  /** Where the files come from. */
  sourceFolder: string;
}

/** Writes the image of `sizeBytes`, a multiple of 8 MiB. @throws CowcatcherError IO or NO_SPACE. */
export function makeDemoDisk(path: string, sizeBytes: number): DemoDisk {
  const sourceFolder = readableFolder();
  const files = new FileContent(sourceFolder);
  const region = Buffer.alloc(REGION_BYTES);
  const disk: DemoDisk = { fileBytes: 0, randomBytes: 0, sourceFolder };
  const fd = openSync(path, "wx", 0o600);
  try {
    ftruncateSync(fd, sizeBytes);
    for (let offset = 0; offset < sizeBytes; offset += REGION_BYTES) {
      const turn = TURNS[(offset / REGION_BYTES) % TURNS.length];
      if (turn === "empty") continue;
      const isFiles = turn === "files" && files.fill(region);
      if (isFiles) disk.fileBytes += REGION_BYTES;
      else {
        randomFillSync(region);
        disk.randomBytes += REGION_BYTES;
      }
      writeSync(fd, region, 0, REGION_BYTES, offset);
    }
  } catch (cause) {
    throw ioError("make the disk", path, cause);
  } finally {
    closeSync(fd);
  }
  return disk;
}

/** The system's libraries and programs, or else the folder of Node itself. */
function readableFolder(): string {
  const isFolder = statSync("/usr/lib", { throwIfNoEntry: false })?.isDirectory() ?? false;
  return isFolder ? "/usr/lib" : dirname(process.execPath);
}

/** The content of a folder's files, one after another, without links and special files. */
class FileContent {
  readonly #folders: string[];
  #files: string[] = [];
  #fileCount = 0;
  #fd: number | undefined;

  constructor(folder: string) {
    this.#folders = [folder];
  }

  /** Fills the buffer; false if the files have come to an end, with the buffer's content undefined. */
  fill(buffer: Buffer): boolean {
    let filled = 0;
    while (filled < buffer.length) {
      this.#fd ??= this.#open();
      if (this.#fd === undefined) return false;
      const readBytes = this.#read(this.#fd, buffer, filled);
      filled += readBytes;
      if (readBytes > 0 && filled < buffer.length) continue;
      closeSync(this.#fd);
      this.#fd = undefined;
    }
    return true;
  }

  #read(fd: number, buffer: Buffer, at: number): number {
    try {
      return readSync(fd, buffer, at, buffer.length - at, null);
    } catch {
      return 0;
    }
  }

  #open(): number | undefined {
    while (this.#fileCount < MAX_FILES) {
      const path = this.#files.pop();
      if (path === undefined) {
        if (!this.#nextFolder()) return undefined;
        continue;
      }
      this.#fileCount++;
      try {
        return openSync(path, "r");
      } catch {
        // A file that this user may not read.
      }
    }
    return undefined;
  }

  #nextFolder(): boolean {
    const folder = this.#folders.pop();
    if (folder === undefined) return false;
    try {
      for (const entry of readdirSync(folder, { withFileTypes: true })) {
        const path = join(folder, entry.name);
        if (entry.isDirectory()) this.#folders.push(path);
        else if (entry.isFile()) this.#files.push(path);
      }
    } catch {
      // A folder that this user may not read.
    }
    return true;
  }
}
