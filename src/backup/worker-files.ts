// Where the pool's entry points are. By address, not by import: a worker is a program of its own, and stands above
// this room. This file stays two folders below the root, as the bundle of the command does (scripts/build.mjs): what
// it finds relative to itself is then found from there as well.

/** Copies chunks (workers/copy.ts). */
export const COPY_WORKER = new URL("../../workers/copy.js", import.meta.url);
/** Makes a buffer's pages ready (workers/pages.ts). */
export const PAGES_WORKER = new URL("../../workers/pages.js", import.meta.url);
/** Reads a target back (workers/verify.ts). */
export const VERIFY_WORKER = new URL("../../workers/verify.js", import.meta.url);
/** Serves one storage thread (workers/storage.ts). */
export const STORAGE_WORKER = new URL("../../workers/storage.js", import.meta.url);
