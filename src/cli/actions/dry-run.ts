// `backup --dry-run`: opens the source, looks whether the target could be made, and says how large it would be and how
// much room there is. Of a disk that a guest uses, too: the server names its image, which is read here without a lock,
// and may have changed by the time the backup is made.
import { checkBacking } from "../../backup/guard/backing-check.js";
import { dirtyRuns } from "../../backup/copy/incremental.js";
import { measureTarget } from "../../backup/job/measure.js";
import { partsInUse, refuseImageAsTarget } from "../../backup/guard/target-guard.js";
import { withBackingOf } from "../../backup/job/top-layer.js";
import type { Image } from "../../block/device.js";
import { openImage } from "../../image/open.js";
import { checkCompression } from "../../image/qcow2/format/compress.js";
import { ControlClient } from "../../qmp/client.js";
import { resolveDestination } from "../../target/file/destination.js";
import { formatBytes } from "../../units.js";
import type { LiveBackupSettings, OfflineBackupSettings } from "../options/backup-options.js";
import type { JobSettings } from "../options/job-settings.js";
import { printJsonDocument, printLine, type CommandContext, type OutputSettings } from "../output/context.js";
import { EXIT } from "../output/exit-codes.js";
import { isNbdUri, isRbdAddress, NULL_TARGET, STDIO, unsupported, usageError } from "../options/options.js";
import { warn } from "../output/report.js";
import { chooseDisk, servedDisks } from "./served-disks.js";
import { dataBytesOf, freeBytesFor } from "./target-space.js";

/** The document of `--dry-run --json`; of several disks an array of them. */
export interface DryRunDocument {
  /** Of a live backup. */
  disk?: string;
  target: string;
  target_format: string;
  /** qemu-img measure's two. */
  required: number;
  "fully-allocated": number;
  /** What is free where the target would stand; null of what is no new file. */
  free: number | null;
}

export async function runDryRun(
  settings: OfflineBackupSettings | LiveBackupSettings,
  { output }: CommandContext,
): Promise<number> {
  const documents =
    settings.mode === "offline"
      ? [await measureOffline(settings, output)]
      : await measureLive(settings, output);
  const [only, ...others] = documents;
  if (output.json) printJsonDocument(output, others.length === 0 ? only : documents);
  else for (const document of documents) printDocument(output, document);
  return EXIT.done;
}

async function measureOffline(
  { source, sourceFormat, snapshot, job }: OfflineBackupSettings,
  output: OutputSettings,
): Promise<DryRunDocument> {
  refuseNoFile(job.target);
  const image = await openImage(source, {
    format: sourceFormat,
    readOnly: true,
    snapshot,
    bitmap: job.bitmap,
  });
  try {
    return await measure(image, job, output);
  } finally {
    await image.close();
  }
}

async function measureLive(
  { control, disks: asked }: LiveBackupSettings,
  output: OutputSettings,
): Promise<DryRunDocument[]> {
  for (const { job } of asked) refuseNoFile(job.target);
  const client = await ControlClient.connect(control);
  try {
    const disks = await servedDisks(client);
    const documents: DryRunDocument[] = [];
    for (const { disk: name, job } of asked) {
      const disk = chooseDisk(name, disks);
      if (disk.path === undefined)
        throw unsupported("--dry-run", "the server does not tell where its image is");
      const format = disk.format === "qcow2" ? "qcow2" : "raw";
      const image = await openImage(disk.path, { format, readOnly: true, lock: false });
      try {
        documents.push({ disk: disk.name, ...(await measure(image, job, output)) });
      } finally {
        await image.close();
      }
    }
    return documents;
  } finally {
    client.close();
  }
}

function refuseNoFile(target: string): void {
  if (target !== NULL_TARGET && target !== STDIO) return;
  throw usageError("--dry-run", `${target} stores nothing`, "name a target");
}

async function measure(image: Image, given: JobSettings, output: OutputSettings): Promise<DryRunDocument> {
  const format = given.targetFormat ?? image.format;
  const job = withBackingOf(image, { ...given, targetFormat: format });
  if (job.bitmap !== undefined) await dirtyRuns(image, job.bitmap);
  const inUse = await partsInUse({ images: [{ image, isSource: true }], listeners: [] });
  await refuseImageAsTarget(job.target, inUse);
  if (!isNbdUri(job.target) && !isRbdAddress(job.target))
    await resolveDestination({ path: job.target, force: job.force });
  await checkBacking({ ...job, path: job.target });
  if (job.compression !== undefined) {
    if (format === "raw") {
      throw usageError("--compress", "a raw target cannot be compressed", "give -O qcow2");
    }
    checkCompression(job.compression, job.target);
  }
  const { requiredBytes, fullyAllocatedBytes } = await measureTarget(image, {
    path: job.target,
    format,
    clusterSizeBytes: job.clusterSizeBytes,
    hasBacking: job.backingFile !== undefined,
    topOnly: job.sync === "top",
  });
  const freeBytes = await freeBytesFor(job.target);
  // The holes of a raw file count towards its size, and take no room.
  const neededBytes = format === "raw" ? ((await dataBytesOf(image)) ?? requiredBytes) : requiredBytes;
  if (freeBytes !== undefined && freeBytes < neededBytes && job.compression === undefined) {
    const problem = `${formatBytes(freeBytes)} are free there, and up to ${formatBytes(neededBytes)} are needed`;
    warn(output, `${job.target}: ${problem}`);
  }
  return {
    target: job.target,
    target_format: format,
    required: requiredBytes,
    "fully-allocated": fullyAllocatedBytes,
    free: freeBytes ?? null,
  };
}

function printDocument(output: OutputSettings, document: DryRunDocument): void {
  const whose = document.disk === undefined ? "" : `${document.disk}: `;
  printLine(output, `${whose}required size: ${document.required}`);
  printLine(output, `${whose}fully allocated size: ${document["fully-allocated"]}`);
  if (document.free !== null) printLine(output, `${whose}free size: ${document.free}`);
}
