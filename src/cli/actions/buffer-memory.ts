// Whether the buffer that `serve` promises its jobs can be had: known at the start, where somebody looks, and not
// only when the first backup fails at night.
import { SMALLEST_BUFFER_BYTES } from "../../backup/options.js";
import { systemMemory, type SystemMemory } from "../../native/memory.js";
import { formatBytes } from "../../units.js";
import type { OutputSettings } from "../output/context.js";
import { usageError } from "../options/options.js";
import { warn } from "../output/report.js";

/**
 * Warns of a buffer for which there is no room now.
 * @throws CowcatcherError USAGE for one for which there never will be.
 */
export function checkBufferMemory(
  bufferBytes: number,
  output: OutputSettings,
  memory: SystemMemory = systemMemory(),
): void {
  if (bufferBytes > 0 && bufferBytes < SMALLEST_BUFFER_BYTES) {
    warn(output, `--cow-buffer-size: raised to ${formatBytes(SMALLEST_BUFFER_BYTES)}, the least that works`);
  }
  const { totalBytes, availableBytes } = memory;
  const size = formatBytes(bufferBytes);
  if (bufferBytes > totalBytes) {
    throw usageError(
      "--cow-buffer-size",
      `${size} is more than the memory there is, ${formatBytes(totalBytes)}`,
      "give less",
    );
  }
  if (availableBytes === undefined || bufferBytes <= availableBytes) return;
  warn(
    output,
    `--cow-buffer-size: ${size} is more than the memory that is free now, ${formatBytes(availableBytes)} ` +
      "(free some, or give less: a backup starts only if it gets its buffer)",
  );
}
