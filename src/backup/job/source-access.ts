// Who may read a source: a new target is never more readable (target/file/attributes.ts).

import type { Image } from "../../block/device.js";
import { statFile } from "../../block/file/calls.js";
import type { SourceAccess } from "../../target/file/attributes.js";

/** Of each file of the image and of its backing chain, all of which a copy has; an export has none. */
export async function accessOf(image: Image): Promise<SourceAccess[]> {
  const found: SourceAccess[] = [];
  for (let layer: Image | null = image; layer !== null; layer = layer.backing) {
    for (const { fd } of layer.files) {
      const { mode, gid } = await statFile(fd);
      found.push({ mode: Number(mode), gid: Number(gid) });
    }
  }
  return found;
}
