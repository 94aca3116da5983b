// Disks with known content for the integration tests.
import { readFileSync, writeFileSync } from "node:fs";
import { Random } from "./random.js";
import { mustRun } from "./server.js";

const STRETCH_BYTES = 256 * 1024;

/** Two thirds of it noise, the rest zeroes, in stretches. */
export function noise(sizeBytes: number, seed = 1): Buffer {
  const random = new Random(seed);
  const content = Buffer.alloc(sizeBytes);
  for (let start = 0; start < sizeBytes; start += STRETCH_BYTES) {
    if (start > 0 && random.chance(0.3)) continue;
    const end = Math.min(start + STRETCH_BYTES, sizeBytes);
    for (let i = start; i + 4 <= end; i += 4) content.writeUInt32LE(random.below(2 ** 32), i);
    content[end - 1] = 1 + random.below(255);
  }
  return content;
}

export function formatOf(path: string): "raw" | "qcow2" {
  return path.endsWith(".qcow2") ? "qcow2" : "raw";
}

/** Makes an image of `content`, its format by its extension. */
export async function makeDisk(path: string, content: Buffer): Promise<string> {
  if (formatOf(path) === "raw") {
    writeFileSync(path, content);
    return path;
  }
  writeFileSync(`${path}.content`, content);
  await mustRun("qemu-img", "convert", "-f", "raw", "-O", "qcow2", `${path}.content`, path);
  return path;
}

/** Byte for byte the same as a guest sees them. */
export async function expectSame(a: string, b: string): Promise<void> {
  await mustRun("qemu-img", "compare", "-U", "-f", formatOf(a), "-F", formatOf(b), a, b);
}

/** qcow2 metadata without an error or a leak. */
export async function expectClean(image: string): Promise<void> {
  if (formatOf(image) === "qcow2") await mustRun("qemu-img", "check", "-q", image);
}

export async function contentOf(image: string): Promise<Buffer> {
  await mustRun("qemu-img", "convert", "-U", "-f", formatOf(image), "-O", "raw", image, `${image}.as-raw`);
  return readFileSync(`${image}.as-raw`);
}
