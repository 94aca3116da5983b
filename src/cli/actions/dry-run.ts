// `backup --dry-run`: opens the source, looks whether the target could be made, and says how large it would be.
import { checkBacking } from "../../backup/guard/backing-check.js";
import { dirtyRuns } from "../../backup/copy/incremental.js";
import { measureTarget } from "../../backup/job/measure.js";
import { refuseImageAsTarget } from "../../backup/guard/target-guard.js";
import { withBackingOf } from "../../backup/job/top-layer.js";
import { openImage } from "../../image/open.js";
import { checkCompression } from "../../image/qcow2/format/compress.js";
import { resolveDestination } from "../../target/file/destination.js";
import type { OfflineBackupSettings } from "../options/backup-options.js";
import { printJsonDocument, printLine, type CommandContext } from "../output/context.js";
import { EXIT } from "../output/exit-codes.js";
import { isNbdUri, NULL_TARGET, STDIO, usageError } from "../options/options.js";

export async function runDryRun(
  settings: OfflineBackupSettings,
  { output }: CommandContext,
): Promise<number> {
  const { source, sourceFormat, snapshot, job: given } = settings;
  if (given.target === NULL_TARGET || given.target === STDIO) {
    throw usageError("--dry-run", `${given.target} stores nothing`, "name a target");
  }
  const image = await openImage(source, {
    format: sourceFormat,
    readOnly: true,
    snapshot,
    bitmap: given.bitmap,
  });
  try {
    const format = given.targetFormat ?? image.format;
    const job = withBackingOf(image, { ...given, targetFormat: format });
    if (job.bitmap !== undefined) await dirtyRuns(image, job.bitmap);
    await refuseImageAsTarget(job.target, { images: [{ image, isSource: true }], listeners: [] });
    if (!isNbdUri(job.target)) await resolveDestination(job.target, job.force);
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
    if (output.json) {
      printJsonDocument(output, { required: requiredBytes, "fully-allocated": fullyAllocatedBytes });
    } else {
      printLine(output, `required size: ${requiredBytes}`);
      printLine(output, `fully allocated size: ${fullyAllocatedBytes}`);
    }
    return EXIT.done;
  } finally {
    await image.close();
  }
}
