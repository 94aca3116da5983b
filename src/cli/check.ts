// `check`: whether a qcow2 image's metadata is sound, in the words of qemu-img check.
import type { ImageFormat } from "../image/format.js";
import { checkExitCode, checkImage, checkResultToJson, type CheckResult } from "../image/qcow2/check.js";
import { printJsonDocument, printLine, type CommandContext } from "./context.js";

export interface CheckFlags {
  format?: ImageFormat;
  forceShare?: boolean;
}

type CheckCounts = Omit<CheckResult, "filename" | "format" | "messages">;

export async function runCheck(path: string, flags: CheckFlags, { output }: CommandContext): Promise<number> {
  const result = await checkImage(path, { format: flags.format, lock: flags.forceShare !== true });
  if (!output.quiet) for (const message of result.messages) output.stderr.write(`${message}\n`);
  if (output.json) printJsonDocument(output, checkResultToJson(result));
  else if (!output.quiet) for (const line of checkLines(result)) printLine(output, line);
  return checkExitCode(result);
}

export function checkLines(result: CheckCounts): string[] {
  const lines = [...verdictLines(result), ...clusterLines(result)];
  if (result.imageEndOffset > 0) lines.push(`Image end offset: ${result.imageEndOffset}`);
  return lines;
}

function verdictLines({ corruptions, leaks, checkErrors }: CheckCounts): string[] {
  if (corruptions + leaks + checkErrors === 0) return ["No errors were found on the image."];
  const lines: string[] = [];
  if (corruptions > 0) {
    lines.push(
      "",
      `${corruptions} errors were found on the image.`,
      "Data may be corrupted, or further writes to the image may corrupt it.",
    );
  }
  if (leaks > 0) {
    lines.push(
      "",
      `${leaks} leaked clusters were found on the image.`,
      "This means waste of disk space, but no harm to data.",
    );
  }
  if (checkErrors > 0) lines.push("", `${checkErrors} internal errors have occurred during the check.`);
  return lines;
}

function clusterLines(result: CheckCounts): string[] {
  const { totalClusters, allocatedClusters, fragmentedClusters, compressedClusters } = result;
  if (totalClusters === 0 || allocatedClusters === 0) return [];
  const percent = (part: number, whole: number): string => `${((part * 100) / whole).toFixed(2)}%`;
  return [
    `${allocatedClusters}/${totalClusters} = ${percent(allocatedClusters, totalClusters)} allocated, ` +
      `${percent(fragmentedClusters, allocatedClusters)} fragmented, ` +
      `${percent(compressedClusters, allocatedClusters)} compressed clusters`,
  ];
}
