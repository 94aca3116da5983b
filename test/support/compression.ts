// Content that compresses in part, and what qemu-img says of the image that was made of it.

import { mustRun } from "./server.js";
import { Random } from "./random.js";

/** Stretches of text, of noise, of one byte and of zeroes, of odd lengths. */
export function mixed(sizeBytes: number, seed: number): Buffer {
  const random = new Random(seed);
  const words = Array.from({ length: 300 }, () => random.below(2 ** 32).toString(36));
  const content = Buffer.alloc(sizeBytes);
  for (let start = 0; start < sizeBytes;) {
    const end = Math.min(start + 1 + random.below(200_000), sizeBytes);
    const kind = random.below(6);
    if (kind < 3) {
      for (let i = start; i < end;) i += content.write(`${random.pick(words)} `, i, end - i, "latin1") || 1;
    } else if (kind === 3) {
      for (let i = start; i < end; i++) content[i] = random.below(256);
    } else if (kind === 4) content.fill(1 + random.below(255), start, end);
    start = end;
  }
  return content;
}

/** What `qemu-img info` has of the image at `path`. */
export async function qcow2InfoOf(
  path: string,
): Promise<{ "compression-type": string; "refcount-bits": number }> {
  const stdout = await mustRun("qemu-img", "info", "--output=json", path);
  return (JSON.parse(stdout) as { "format-specific": { data: Awaited<ReturnType<typeof qcow2InfoOf>> } })[
    "format-specific"
  ].data;
}

export async function compressionTypeOf(path: string): Promise<string> {
  return (await qcow2InfoOf(path))["compression-type"];
}

/** Compressed clusters of the image at `path`, as `qemu-img check` counts them. */
export async function compressedCount(path: string): Promise<number> {
  const stdout = await mustRun("qemu-img", "check", "--output=json", path);
  return (JSON.parse(stdout) as { "compressed-clusters"?: number })["compressed-clusters"] ?? 0;
}
