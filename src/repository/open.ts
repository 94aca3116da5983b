// From any address to an opened image or reader: those of backups here, all others in the room of images.

import type { Image, SourceDescription, SourceReader } from "../block/device.js";
import { CowcatcherError } from "../errors.js";
import { openImage, type OpenOptions } from "../image/open.js";
import { openSource } from "../image/reader.js";
import { isBackupAddress, parseBackupAddress } from "./address.js";
import type { KeySource } from "./format/keys.js";
import { RepositoryImage } from "./read/image.js";
import { RepositorySourceReader } from "./read/source-reader.js";
import { diskOf, Repository } from "./repository.js";

export interface OpenAnyOptions extends OpenOptions {
  /** What encrypted repositories are opened with. */
  repositoryKey?: (() => Promise<KeySource | undefined>) | undefined;
}

/** Main thread. @throws CowcatcherError as openImage; for a backup as Repository.open and find, and USAGE to write one. */
export async function openAnyImage(address: string, options: OpenAnyOptions): Promise<Image> {
  if (!isBackupAddress(address)) return openImage(address, options);
  if (!options.readOnly)
    throw refused("IO", address, "a backup cannot be written", "give --read-only, or restore it");
  if (options.format === "qcow2") {
    throw refused(
      "UNSUPPORTED",
      address,
      "a backup is read as the disk that it holds",
      "leave the format out",
    );
  }
  if (options.snapshot !== undefined) {
    throw refused("UNSUPPORTED", address, "a backup has no internal snapshots", "leave --snapshot out");
  }
  return openBackup(address, options.repositoryKey ?? (() => Promise.resolve(undefined)));
}

async function openBackup(
  address: string,
  key: () => Promise<KeySource | undefined>,
): Promise<RepositoryImage> {
  const parsed = parseBackupAddress(address);
  const repository = await Repository.open(parsed.repository, key);
  try {
    const manifest = await repository.find(parsed);
    const disk = diskOf(repository.name, manifest, parsed.disk);
    const index = await repository.readIndex(manifest, disk);
    return new RepositoryImage(address, repository, manifest, disk, index);
  } catch (error) {
    repository.close();
    throw error;
  }
}

/** A worker's reader; see openSource. */
export function openAnySource(
  description: SourceDescription,
  isCancelled?: () => boolean,
  mayBlock?: boolean,
): SourceReader {
  return description.format === "repository"
    ? new RepositorySourceReader(description)
    : openSource(description, isCancelled, mayBlock);
}

function refused(code: "IO" | "UNSUPPORTED", object: string, problem: string, hint: string): CowcatcherError {
  return new CowcatcherError({ code, object, problem, hint });
}
