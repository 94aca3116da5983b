// `-` as SOURCE: the image on standard input, where that is a file or a device that was redirected there.
import { fstatSync, realpathSync } from "node:fs";
import { usageError } from "./options.js";

const STDIN_FD = 0;
const STDIN_PATH = `/proc/self/fd/${STDIN_FD}`;

/**
 * The path of what standard input is redirected from.
 * @throws CowcatcherError USAGE for a pipe, a terminal or a socket: an image's size must be known before its copy
 *   begins, and its data is read where it stands.
 */
export function standardInput(argument: string): string {
  const stats = fstatSync(STDIN_FD);
  if (stats.isFile() || stats.isBlockDevice()) {
    // Backing files are named from the image's own folder. A file without a name has the descriptor alone.
    try {
      return realpathSync(STDIN_PATH);
    } catch {
      return STDIN_PATH;
    }
  }
  throw usageError(
    argument,
    "- is standard input, which is no file here: neither its size nor its end is known",
    "redirect from a file (< disk.img), or write the stream to a file first; a file of this name is ./-",
  );
}
