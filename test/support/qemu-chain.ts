// A chain of backups of a QEMU's disk by its own bitmaps, each compared with the disk at an instant.
import { join } from "node:path";
import { expect } from "vitest";
import { expectSchema } from "./json-schema.js";
import type { Qemu } from "./qemu.js";
import { type Backup, mustRun } from "./server.js";

/** What the chain that ends there shows, as a raw image. */
export async function flatOf(path: string): Promise<string> {
  const flat = `${path}.flat`;
  await mustRun("qemu-img", "convert", "-O", "raw", path, flat);
  return flat;
}

/** A full backup and incremental ones under the guest's writes: each is one instant, no earlier than the one before. */
export async function expectChain(
  qemu: Qemu,
  folder: string,
  count: number,
  backup: (args: readonly string[]) => Backup,
): Promise<void> {
  let base: string | undefined;
  let earliest = 1;
  for (let i = 0; i < count; i++) {
    const target = join(folder, `${i}.qcow2`);
    const onto = base === undefined ? [] : ["-b", base, "-B", "qcow2"];
    const summary = await backup([...onto, target]).succeed();
    expect(summary).toMatchObject({ level: base === undefined ? "full" : "incremental" });
    expectSchema("backup", summary);
    const instant = qemu.instantOf([await flatOf(target)], earliest);
    expect(instant).toBeGreaterThanOrEqual(earliest);
    earliest = instant;
    base = target;
  }
}
