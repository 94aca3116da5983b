// Where file systems are mounted, as /proc/self/mountinfo has it (proc(5)): in each line the fifth field is the mount
// point, in which space, tab, line feed and backslash stand as octal escapes.

import { dirname } from "node:path";
import { decodeName } from "../../file-names.js";
import { readBytes } from "./calls.js";

const MOUNT_POINT_FIELD = 4;

/** Absolute paths of the mount points right in the folder, an absolute path itself; none where /proc does not tell. */
export async function mountPointsIn(folder: string): Promise<ReadonlySet<string>> {
  const text = await readBytes("/proc/self/mountinfo").then(
    (bytes) => bytes.toString("latin1"),
    () => "",
  );
  const points = text.split("\n").map((line) => unescapeName(line.split(" ")[MOUNT_POINT_FIELD] ?? ""));
  return new Set(points.filter((point) => point !== "" && dirname(point) === folder));
}

/** @param field a character a byte */
function unescapeName(field: string): string {
  const bytes = field.replace(/\\([0-7]{3})/g, (_escape, octal: string) =>
    String.fromCharCode(parseInt(octal, 8)),
  );
  return decodeName(Buffer.from(bytes, "latin1"));
}
