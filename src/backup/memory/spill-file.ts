// The spill file of a job. It is unlinked as soon as it is open: the kernel frees it with the process, however
// that ends.

import { closeSync } from "node:fs";
import { stat } from "node:fs/promises";
import { tmpdir } from "node:os";
import { dirname } from "node:path";
import type { SpillDescription } from "../../cow/spill.js";
import { isRbdAddress } from "../../rbd/address.js";
import { createTemporary, removeStale, unlinkTemporary } from "../../target/file/temporary.js";

const PREFIX = "spill";

export interface OpenSpill extends SpillDescription {
  close(): void;
}

/**
 * @param spillDir undefined: the target's folder if the target is a local file, else the temporary folder.
 * @throws CowcatcherError NOT_FOUND or IO, naming the folder.
 */
export async function openSpillFile(spillDir: string | undefined, target: string): Promise<OpenSpill> {
  const directory = spillDir ?? (await defaultDirectory(target));
  await removeStale(directory, PREFIX);
  const temporary = createTemporary(directory, PREFIX);
  unlinkTemporary(temporary);
  return { path: temporary.path, fd: temporary.fd, close: () => closeSync(temporary.fd) };
}

async function defaultDirectory(target: string): Promise<string> {
  if (target === "null:" || target.includes("://") || isRbdAddress(target)) return tmpdir();
  const existing = await stat(target).catch(() => undefined);
  return existing !== undefined && !existing.isFile() ? tmpdir() : dirname(target);
}
