// piscina, loaded for the first pool: a command that needs no thread does not wait for its modules.

import { closeSync, openSync } from "node:fs";
import { createRequire } from "node:module";

/** @throws what the system says where there are no descriptors left to find it: Node says that it is not there. */
export function loadPiscina(): typeof import("piscina") {
  try {
    return createRequire(import.meta.url)("piscina") as typeof import("piscina");
  } catch (error) {
    closeSync(openSync("/dev/null", "r"));
    throw error;
  }
}
