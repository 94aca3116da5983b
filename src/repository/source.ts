// From the description of any source to its reader: backups are read here, all else in the room of images. A worker's.

import type { SourceDescription, SourceReader } from "../block/device.js";
import { openSource } from "../image/reader.js";
import { RepositorySourceReader } from "./read/source-reader.js";

/** A worker's reader; see openSource. */
export function openAnySource(
  description: SourceDescription,
  isCancelled?: () => boolean,
  mayBlock?: boolean,
): SourceReader {
  return description.format === "repository"
    ? new RepositorySourceReader(description)
    : openSource(description, isCancelled, mayBlock);
}
