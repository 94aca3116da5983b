// A chain of backups of a QEMU's disk by its own bitmaps, in files or in a repository, each compared with the disk at an
// instant.
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { expect } from "vitest";
import { RepositoryImage } from "../../src/repository/read/image.js";
import { Repository } from "../../src/repository/repository.js";
import { MiB } from "../../src/units.js";
import { expectSchema } from "./json-schema.js";
import type { Qemu } from "./qemu.js";
import { type Backup, mustRun, type Summary } from "./server.js";

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

/** A group of backups of all disks of a QEMU, in a repository of its own, which is read in this process. */
export class GroupOfDisks {
  readonly chunkBytes = MiB;
  /** Writes that the last backup has. */
  instant = 1;

  private constructor(
    public qemu: Qemu,
    readonly repository: string,
    readonly folder: string,
    readonly disks: readonly string[],
  ) {}

  static async init(qemu: Qemu, folder: string, disks: readonly string[] = ["vd0"]): Promise<GroupOfDisks> {
    const group = new GroupOfDisks(qemu, join(folder, "repo"), folder, disks);
    const { chunkBytes } = group;
    (await Repository.init(group.repository, { chunkBytes, compression: null, key: undefined })).close();
    return group;
  }

  /** The backup is good, its disks are one instant, no earlier than the one before, and it says of itself what it is. */
  async expectNext(backup: Backup): Promise<Summary & { level: string; level_reason: string }> {
    const summary = (await backup.succeed()) as Summary & { level: string; level_reason: string };
    expectSchema("backup", summary);
    const repository = await Repository.open(this.repository, () => Promise.resolve(undefined));
    const manifest = await repository.find({ group: "vm", time: "latest" });
    expect([manifest.level, manifest.level_reason]).toEqual([summary.level, summary.level_reason]);
    const flats: string[] = [];
    for (const disk of this.disks) {
      const index = await repository.readIndex(manifest, disk);
      const image = new RepositoryImage(disk, repository, manifest, disk, index);
      const content = Buffer.alloc(image.sizeBytes);
      await image.read(content, 0, content.length, 0);
      const flat = join(this.folder, `${disk}.flat`);
      writeFileSync(flat, content);
      flats.push(flat);
    }
    repository.close();
    const instant = this.qemu.instantOf(flats, this.instant);
    expect(instant).toBeGreaterThanOrEqual(this.instant);
    this.instant = instant;
    return summary;
  }
}
