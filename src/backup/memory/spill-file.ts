// The spill file of a job. It has no name, or loses it as soon as it is open: the kernel frees it with the process,
// however that ends. On a storage thread (storage/thread.ts).

import { tmpdir } from "node:os";
import { dirname } from "node:path";
import { statPath } from "../../block/file/calls.js";
import { isRbdAddress } from "../../rbd/address.js";
import {
  createTemporary,
  createUnnamed,
  sweepFolder,
  temporaryPath,
  unlinkTemporary,
} from "../../target/file/temporary.js";

const PREFIX = "spill";

/**
 * @param spillDir undefined: the target's folder if the target is a local file, else the temporary folder.
 * @throws CowcatcherError NOT_FOUND or IO, naming the folder.
 */
export async function openSpillFile(
  spillDir: string | undefined,
  target: string,
): Promise<{ path: string; fd: number }> {
  const directory = spillDir ?? (await defaultDirectory(target));
  await sweepFolder(directory, PREFIX);
  const unnamedFd = await createUnnamed(directory);
  if (unnamedFd !== null) return { path: temporaryPath(directory, PREFIX), fd: unnamedFd };
  const temporary = await createTemporary(directory, PREFIX);
  await unlinkTemporary(temporary);
  return { path: temporary.path, fd: temporary.fd };
}

async function defaultDirectory(target: string): Promise<string> {
  if (target === "null:" || target.includes("://") || isRbdAddress(target)) return tmpdir();
  const existing = await statPath(target).catch(() => undefined);
  return existing !== undefined && !existing.isFile() ? tmpdir() : dirname(target);
}
