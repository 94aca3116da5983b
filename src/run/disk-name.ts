// What a disk is called where only its image is known.
import { basename } from "node:path";

/** The file's name without its ending, as far as it can be the name of a disk. */
export function diskNameOf(source: string): string {
  const name = basename(source.replace(/[?].*$/, "")).replace(/\.(?:qcow2?|raw|img)$/i, "");
  return (
    name
      .replace(/[^A-Za-z0-9._+-]/g, "-")
      .replace(/^[^A-Za-z0-9]+/, "")
      .slice(0, 100) || "disk"
  );
}
