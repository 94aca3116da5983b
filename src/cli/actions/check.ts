// `check`: whether a qcow2 image's metadata is sound, and its repair, in the words of qemu-img check.
import { NO_CHECKS, type ImageFormat } from "../../block/format.js";
import type { RepairMode } from "../../image/qcow2/check/state.js";
import {
  checkExitCode,
  checkImage,
  checkResultToJson,
  type CheckResult,
} from "../../image/qcow2/check/check.js";
import { printJsonDocument, printLine, type CommandContext } from "../output/context.js";
import { isNbdUri, isRbdAddress, parseImage, unsupported, usageError } from "../options/options.js";

export interface CheckFlags {
  format?: ImageFormat;
  forceShare?: boolean;
  /** Without its value the option takes the next word, which may be the image. */
  repair?: string | true;
}

export interface CheckRequest {
  path: string;
  repair: RepairMode | undefined;
}

type CheckCounts = Omit<CheckResult, "filename" | "format" | "messages" | "corruptionsFixed" | "leaksFixed">;

/** @throws CowcatcherError USAGE */
export function parseCheckRequest(image: string | undefined, flags: CheckFlags): CheckRequest {
  const { repair } = flags;
  if (repair !== undefined && flags.forceShare === true) {
    throw usageError("--repair", "does not go with --force-share", "stop whatever uses the image first");
  }
  if (repair === undefined || repair === true || repair === "all" || repair === "leaks") {
    if (image === undefined) throw usageError("IMAGE", "is missing", "see cowcatcher check --help");
    return { path: parseCheckable(image), repair: repair === true ? "all" : repair };
  }
  if (image === undefined) return { path: parseCheckable(repair), repair: "all" };
  throw usageError("--repair", `'${repair}' is not known`, "give leaks or all");
}

/** What an export shows is a raw disk. */
function parseCheckable(image: string): string {
  const path = parseImage(image);
  if (!isNbdUri(path) && !isRbdAddress(path)) return path;
  throw unsupported(path, NO_CHECKS, "check the image where it is stored");
}

export async function runCheck(
  { path, repair }: CheckRequest,
  flags: CheckFlags,
  { output }: CommandContext,
): Promise<number> {
  const result = await checkImage(path, { format: flags.format, lock: flags.forceShare !== true, repair });
  if (!output.quiet) for (const message of result.messages) output.stderr.write(`${message}\n`);
  if (output.json) printJsonDocument(output, checkResultToJson(result));
  else if (!output.quiet) {
    for (const line of [...repairLines(result), ...checkLines(result)]) printLine(output, line);
  }
  return checkExitCode(result);
}

export function repairLines({ leaksFixed, corruptionsFixed }: CheckResult): string[] {
  if (leaksFixed + corruptionsFixed === 0) return [];
  return [
    "The following inconsistencies were found and repaired:",
    "",
    `    ${leaksFixed} leaked clusters`,
    `    ${corruptionsFixed} corruptions`,
    "",
    "Double checking the fixed image now...",
  ];
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
