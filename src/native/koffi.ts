// koffi, which calls C functions, where it is to be had. It is a package with a prebuilt part for each platform: where
// that is missing or does not load, everything goes on without it, slower and without locks (docs/architecture.md). So
// no file but this one may import it.

import { createRequire } from "node:module";

type Koffi = typeof import("koffi");

let loaded: Koffi | undefined;
let failure: Error | undefined;

/** @throws what loading it threw, each time. Any thread. */
export function loadKoffi(): Koffi {
  if (loaded !== undefined) return loaded;
  if (failure !== undefined) throw failure;
  try {
    return (loaded = createRequire(import.meta.url)("koffi") as Koffi);
  } catch (error) {
    failure = error instanceof Error ? error : new Error(String(error));
    throw failure;
  }
}

/** Why there are no native calls; undefined: there are, or the user wants none (COWCATCHER_NO_NATIVE=1). */
export function missingKoffi(): unknown {
  if (process.env["COWCATCHER_NO_NATIVE"] === "1") return undefined;
  try {
    loadKoffi();
    return undefined;
  } catch (error) {
    return error;
  }
}
