import { warn } from "../output/report.js";
import type { OutputSettings } from "../output/context.js";

/** An empty disk is rarely what a backup was made for: a path that was mistyped, an image that was cut. */
export function warnOfEmptySource(output: OutputSettings, name: string, sizeBytes: number): void {
  if (sizeBytes === 0)
    warn(output, `${name}: has 0 bytes, so there is nothing to copy (is it the right one?)`);
}
