// Where the command's entry is, which runs are children of: found from here, as whoever started this process may be another
// program. This file stays two folders below the root, as the bundle of the command does (scripts/build.mjs).
import { fileURLToPath } from "node:url";

export const COMMAND_ENTRY = fileURLToPath(new URL("../../src/cli/main.js", import.meta.url));
