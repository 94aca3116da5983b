// The external data file of a qcow2 image: from the name in its header to an opened, locked file.
//
// A relative name starts from the image's folder, as a backing file's does. (QEMU starts it from the folder that it
// is run in; the two agree where that is the image's.) The file is always raw and never probed. It is opened for
// writing only where the image is, with the locks of a disk that is in use so. It may be none of the files that are
// open already: writing the guest's clusters over the image's own metadata, or over its backing file, would be the
// end of both.

import { fstatSync } from "node:fs";
import { CowcatcherError } from "../errors.js";
import { besides } from "../file-names.js";
import { closeFile } from "../block/file/fileio.js";
import { openImageFile } from "../block/file/image-file.js";
import { acquireImageLock } from "../block/file/locks.js";
import { type Qcow2Header, hasExternalDataFile } from "./qcow2/format/header.js";

export interface ExternalData {
  dataFd: number;
  dataName: string;
}

export interface ExternalDataOptions {
  readOnly: boolean;
  direct: boolean;
  lock: boolean;
  /** fileIdentity of every file that the chain consists of so far; the data file is added. */
  files: Set<string>;
}

/**
 * Opens the data file that the header names; undefined where it has none.
 * @throws CowcatcherError NOT_FOUND, UNSUPPORTED (a protocol), FORMAT (no name, or one that leads back), LOCKED, IO
 */
export async function openExternalData(
  imagePath: string,
  header: Qcow2Header,
  options: ExternalDataOptions,
): Promise<ExternalData | undefined> {
  if (!hasExternalDataFile(header)) return undefined;
  const dataName = resolveDataFile(imagePath, header.externalDataFile);
  const dataFd = await openNamed(imagePath, dataName, options);
  try {
    const identity = fileIdentity(dataFd);
    if (options.files.has(identity)) {
      throw new CowcatcherError({
        code: "FORMAT",
        object: imagePath,
        problem: `its data file '${dataName}' is the image itself, or another file of its chain`,
        hint: "name another with qemu-img amend -o data_file=NAME",
      });
    }
    options.files.add(identity);
    if (options.lock)
      acquireImageLock(dataFd, dataName, { write: !options.readOnly, resize: !options.readOnly });
    return { dataFd, dataName };
  } catch (error) {
    await closeFile(dataFd);
    throw error;
  }
}

/** The same for two names of one file or device. */
export function fileIdentity(fd: number): string {
  const stats = fstatSync(fd);
  return stats.isBlockDevice() ? `rdev:${stats.rdev}` : `${stats.dev}:${stats.ino}`;
}

/** Where the name in the header leads. @throws CowcatcherError FORMAT or UNSUPPORTED */
export function resolveDataFile(imagePath: string, name: string | null): string {
  if (name === null || name === "") {
    throw new CowcatcherError({
      code: "FORMAT",
      object: imagePath,
      problem: "the image keeps its data in an external data file, and does not name it",
      hint: "name it with qemu-img amend -o data_file=NAME",
    });
  }
  const protocol = /^([^/:]*):/.exec(name)?.[1];
  if (protocol !== undefined && protocol !== "file") {
    throw new CowcatcherError({
      code: "UNSUPPORTED",
      object: imagePath,
      problem: `its data file is '${protocol}:…', and data files must be local files`,
      hint: "copy the image with qemu-img convert",
    });
  }
  const plainName = protocol === "file" ? name.slice("file:".length) : name;
  return besides(imagePath, plainName);
}

async function openNamed(
  imagePath: string,
  dataName: string,
  { readOnly, direct }: ExternalDataOptions,
): Promise<number> {
  try {
    return await openImageFile(dataName, { readOnly, direct });
  } catch (error) {
    if (!(error instanceof CowcatcherError) || error.code !== "NOT_FOUND") throw error;
    throw new CowcatcherError({
      code: "NOT_FOUND",
      object: imagePath,
      problem: `its data file '${dataName}' does not exist`,
      hint: "bring it back, or correct the name with qemu-img amend -o data_file=NAME",
      errno: error.errno,
      cause: error,
    });
  }
}
