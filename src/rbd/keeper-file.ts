// Where the keeper's thread begins. By address, as a thread is a program of its own and stands above this room. Two folders
// below the root, as the bundle of the command is (scripts/build.mjs).

export const KEEPER_WORKER = new URL("../../workers/rbd.js", import.meta.url);
