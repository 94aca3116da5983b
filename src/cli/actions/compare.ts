// `compare`: whether two images have the same content, in the words of qemu-img compare.
import { compareImages, type CompareResult } from "../../image/compare.js";
import type { ImageFormat } from "../../block/format.js";
import { openAnyImage } from "../../repository/open.js";
import { printJsonDocument, printLine, type CommandContext } from "../output/context.js";
import { type KeyFlags, lazyKey } from "../options/repository-options.js";
import { COMPARE_EXIT } from "../output/exit-codes.js";

export interface CompareFlags extends KeyFlags {
  /** Of the first image. */
  format?: ImageFormat;
  /** Of the second image. */
  format2?: ImageFormat;
  forceShare?: boolean;
  /** Id or name of an internal snapshot of the first image. */
  snapshot?: string;
  strict?: boolean;
}

/** What `compare --json` prints; qemu-img has no such document. */
export interface CompareDocument {
  same: boolean;
  /** What differs first; with --strict also the allocation ("status") or the size. */
  difference: CompareResult["difference"];
  /** Byte offset of the difference, where it has one. */
  offset: number | null;
  sizes_differ: boolean;
}

export async function runCompare(
  pathA: string,
  pathB: string,
  flags: CompareFlags,
  { output }: CommandContext,
): Promise<number> {
  const { result, commonBytes } = await compareFiles(pathA, pathB, flags);
  if (output.json) printJsonDocument(output, compareDocument(result));
  else if (!output.quiet) for (const line of compareLines(result, commonBytes)) printLine(output, line);
  return result.same ? COMPARE_EXIT.same : COMPARE_EXIT.different;
}

/** `commonBytes` is the shorter image's size. */
async function compareFiles(
  pathA: string,
  pathB: string,
  flags: CompareFlags,
): Promise<{ result: CompareResult; commonBytes: number }> {
  const shared = { repositoryKey: lazyKey(flags), readOnly: true, lock: flags.forceShare !== true };
  const a = await openAnyImage(pathA, { ...shared, format: flags.format, snapshot: flags.snapshot });
  try {
    const b = await openAnyImage(pathB, { ...shared, format: flags.format2 });
    try {
      const result = await compareImages(a, b, { strict: flags.strict });
      return { result, commonBytes: Math.min(a.sizeBytes, b.sizeBytes) };
    } finally {
      await b.close();
    }
  } finally {
    await a.close();
  }
}

export function compareDocument(result: CompareResult): CompareDocument {
  return {
    same: result.same,
    difference: result.difference,
    offset: result.offsetBytes,
    sizes_differ: result.sizesDiffer,
  };
}

/** Different sizes are warned of where the comparison gets to the shorter image's end. */
export function compareLines(
  { difference, offsetBytes, sizesDiffer }: CompareResult,
  commonBytes: number,
): string[] {
  if (difference === "size") return ["Strict mode: Image size mismatch!"];
  const lines =
    sizesDiffer && (offsetBytes ?? commonBytes) >= commonBytes ? ["Warning: Image size mismatch!"] : [];
  if (difference === "status") lines.push(`Strict mode: Offset ${offsetBytes} block status mismatch!`);
  else if (difference === "content") lines.push(`Content mismatch at offset ${offsetBytes}!`);
  else lines.push("Images are identical.");
  return lines;
}
