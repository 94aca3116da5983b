// Makes a target from what the user asked for. On the thread that is to have it (backup/storage); offline the main thread.

import { CowcatcherError } from "../errors.js";
import { isNbdUri } from "../nbd/wire/uri.js";
import { isRbdAddress } from "../rbd/address.js";
import { createNbdTarget } from "./nbd.js";
import { NULL_TARGET_PATH, NullTarget } from "./null.js";
import { createQcow2Target } from "./qcow2/qcow2.js";
import { createRbdTarget } from "./rbd.js";
import { createRawTarget } from "./file/raw.js";
import { createStdoutTarget, STDOUT_TARGET_PATH } from "./stdout.js";
import type { Target, TargetOptions } from "./target.js";

/**
 * Opens what the target is written to; nothing stands at `options.path` until commit().
 * @throws CowcatcherError EXISTS without `force`, NOT_FOUND for a missing folder, LOCKED for a file or device
 * that another program uses, USAGE or LIMIT for a geometry that the format does not have, UNSUPPORTED, NO_SPACE, IO.
 */
export async function createTarget(options: TargetOptions): Promise<Target> {
  if (options.path === NULL_TARGET_PATH) return new NullTarget();
  if (options.path === STDOUT_TARGET_PATH) return createStdoutTarget(options);
  if (isNbdUri(options.path)) return createNbdTarget(options);
  if (isRbdAddress(options.path)) return createRbdTarget(options);
  if (!Number.isSafeInteger(options.sizeBytes) || options.sizeBytes < 0) {
    throw new CowcatcherError({
      code: "USAGE",
      object: options.path,
      problem: `${options.sizeBytes} is not a size in bytes`,
    });
  }
  if (options.format === "qcow2") return createQcow2Target(options);
  if (options.compression !== undefined) {
    throw new CowcatcherError({
      code: "USAGE",
      object: options.path,
      problem: "a raw target cannot be compressed",
      hint: "choose qcow2",
    });
  }
  return createRawTarget(options);
}
