// From any address to an opened image: those of backups here, all others in the room of images.

import type { Image } from "../block/device.js";
import { CowcatcherError } from "../errors.js";
import { openImage, type OpenOptions } from "../image/open.js";
import { isBackupAddress, parseBackupAddress } from "./address.js";
import type { KeySource } from "./format/keys.js";
import type { RepositoryImage } from "./read/image.js";

export interface OpenAnyOptions extends OpenOptions {
  /** What encrypted repositories are opened with. */
  repositoryKey?: (() => Promise<KeySource | undefined>) | undefined;
}

/** Main thread. @throws CowcatcherError as openImage; for a backup as Repository.open and find, and USAGE to write one. */
export async function openAnyImage(address: string, options: OpenAnyOptions): Promise<Image> {
  return isBackupAddress(address) ? openBackup(address, options) : openImage(address, options);
}

/** The same for the address of a backup alone. */
export async function openBackup(address: string, options: OpenAnyOptions): Promise<RepositoryImage> {
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
  const { repositoryKey: key = () => Promise.resolve(undefined) } = options;
  const parsed = parseBackupAddress(address);
  // Loaded where there is one: most commands open images.
  const [{ diskOf, Repository }, { RepositoryImage }] = await Promise.all([
    import("./repository.js"),
    import("./read/image.js"),
  ]);
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

function refused(code: "IO" | "UNSUPPORTED", object: string, problem: string, hint: string): CowcatcherError {
  return new CowcatcherError({ code, object, problem, hint });
}
