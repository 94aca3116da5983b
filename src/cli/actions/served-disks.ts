// What a server says of its disks, as far as a backup needs it.
import type { ControlClient } from "../../qmp/client.js";
import { isJsonObject } from "../../qmp/protocol.js";
import { CowcatcherError } from "../../errors.js";
import { usageError } from "../options/options.js";

export interface ServedDisk {
  name: string;
  sizeBytes: number;
  format: string | undefined;
  /** Absolute, or a URI; undefined where an older server does not tell. */
  path: string | undefined;
  /** About what there is to copy; undefined: unknown. */
  dataBytes: number | undefined;
  /** Backups of it so far. */
  jobCount: number;
}

export async function servedDisks(client: ControlClient): Promise<Map<string, ServedDisk>> {
  const answer = await client.execute("query-named-block-nodes");
  const disks = new Map<string, ServedDisk>();
  for (const node of Array.isArray(answer) ? answer.filter(isJsonObject) : []) {
    const { "node-name": name, image, drv, "x-cowcatcher": more } = node;
    if (typeof name !== "string") continue;
    const { "virtual-size": size } = isJsonObject(image) ? image : {};
    const { path, allocated, "job-count": jobCount } = isJsonObject(more) ? more : {};
    const sizeBytes = typeof size === "number" ? size : 0;
    disks.set(name, {
      name,
      sizeBytes,
      format: typeof drv === "string" ? drv : undefined,
      path: typeof path === "string" ? path : undefined,
      dataBytes: typeof allocated === "number" ? Math.min(allocated, sizeBytes) : undefined,
      jobCount: typeof jobCount === "number" ? jobCount : 0,
    });
  }
  return disks;
}

/**
 * The disk of this name, or the server's only one.
 * @throws CowcatcherError USAGE where there are several and none is named, NOT_FOUND.
 */
export function chooseDisk(disk: string | undefined, disks: ReadonlyMap<string, ServedDisk>): ServedDisk {
  const [only, ...others] = disks.values();
  const names = [...disks.keys()].join(", ");
  if (disk === undefined && others.length > 0) {
    throw usageError("--disk", "is missing", `the server has several: ${names}`);
  }
  const found = disk === undefined ? only : disks.get(disk);
  if (found !== undefined) return found;
  throw new CowcatcherError({
    code: "NOT_FOUND",
    object: disk === undefined ? "the server" : `--disk ${disk}`,
    problem: "the server has no disk of this name",
    hint: `it has ${names}`,
  });
}

/**
 * NAME-N, with N counting the backups of the disk since the server began. An id has letters, digits, '-', '.' and '_', and
 * begins with a letter (QEMU's rule); other characters of a name become '_'.
 * @param taken ids that others of the same command have
 */
export function jobIdOf({ name, jobCount }: ServedDisk, taken: ReadonlySet<string>): string {
  const plain = name.replace(/[^A-Za-z0-9._-]/g, "_");
  const stem = /^[A-Za-z]/.test(plain) ? plain : `disk-${plain}`;
  let number = jobCount + 1;
  while (taken.has(`${stem}-${number}`)) number++;
  return `${stem}-${number}`;
}
