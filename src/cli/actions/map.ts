// `map`: which ranges of an image hold data and where, in the words of qemu-img map.
import { CowcatcherError } from "../../errors.js";
import type { BlockStatus, Image } from "../../block/device.js";
import type { ImageFormat } from "../../block/format.js";
import { endOfLastSector, lastSectorStatus } from "../../image/last-sector.js";
import { openAnyImage } from "../../repository/open.js";
import { Qcow2Image } from "../../image/qcow2/image.js";
import { printLine, type CommandContext } from "../output/context.js";
import { type KeyFlags, lazyKey } from "../options/repository-options.js";
import { EXIT } from "../output/exit-codes.js";
import { qemuHex } from "../output/qemu-text.js";

export interface MapFlags extends KeyFlags {
  format?: ImageFormat;
  forceShare?: boolean;
  /** Id or name of an internal snapshot. */
  snapshot?: string;
  /** Bytes. */
  startOffset?: number;
  /** Bytes. */
  maxLength?: number;
}

/** qemu-img map's JSON, name for name. */
export interface MapEntry {
  start: number;
  length: number;
  depth: number;
  present: boolean;
  zero: boolean;
  data: boolean;
  offset?: number;
}

export async function runMap(path: string, flags: MapFlags, context: CommandContext): Promise<number> {
  const image = await openAnyImage(path, {
    repositoryKey: lazyKey(flags),
    format: flags.format,
    readOnly: true,
    lock: flags.forceShare !== true,
    snapshot: flags.snapshot,
  });
  try {
    const start = flags.startOffset ?? 0;
    const diskEnd = endOfLastSector(image);
    const end = Math.min(diskEnd, start + (flags.maxLength ?? diskEnd));
    const entries = start < end ? mergedEntries(image, start, end) : [nothingAt(start)];
    await (context.output.json ? printJson(entries, context) : printText(entries, image, context));
  } finally {
    await image.close();
  }
  return EXIT.done;
}

type MappedImage = Pick<Image, "blockStatus" | "backing" | "sizeBytes" | "files">;

/**
 * Entries of [start, end), up to the end of the last sector at most, with neighbours made one where nothing but the
 * offset changes, and that in step.
 */
export async function* mergedEntries(
  image: MappedImage,
  start: number,
  end: number,
): AsyncGenerator<MapEntry> {
  let pending: MapEntry | undefined;
  for (let at = start; at < end;) {
    const answer = statusAt(image, at, end);
    const next = asQemuShowsIt(toEntry(at, answer instanceof Promise ? await answer : answer), image);
    at += next.length;
    if (pending === undefined) {
      pending = next;
    } else if (canMerge(pending, next)) {
      pending.length += next.length;
    } else {
      yield pending;
      pending = next;
    }
  }
  if (pending !== undefined) yield pending;
}

function statusAt(image: MappedImage, start: number, end: number): BlockStatus | Promise<BlockStatus> {
  const stored = image.sizeBytes - start;
  if (stored <= 0) return lastSectorStatus(image, start, end - start);
  return image.blockStatus(start, Math.min(stored, end - start));
}

/** What qemu-img shows of a range that has nothing in it. */
function nothingAt(start: number): MapEntry {
  return { start, length: 0, depth: 0, present: false, zero: false, data: false };
}

function toEntry(start: number, status: BlockStatus): MapEntry {
  const { lengthBytes: length, depth, present, zero, data, hostOffsetBytes: offset } = status;
  return { start, length, depth, present, zero, data, ...(offset === undefined ? {} : { offset }) };
}

function canMerge(a: MapEntry, b: MapEntry): boolean {
  const sameKind = a.zero === b.zero && a.data === b.data && a.present === b.present && a.depth === b.depth;
  const expectedOffset = a.offset === undefined ? undefined : a.offset + a.length;
  return sameKind && b.offset === expectedOffset;
}

/** An array, an entry a line, written as it is found: a fragmented image has millions of entries. */
async function printJson(
  entries: AsyncIterable<MapEntry> | Iterable<MapEntry>,
  { output }: CommandContext,
): Promise<void> {
  let separator = "[";
  for await (const entry of entries) {
    output.stdout.write(`${separator}${JSON.stringify(entry)}`);
    separator = ",\n";
  }
  output.stdout.write(separator === "[" ? "[]\n" : "]\n");
}

async function printText(
  entries: AsyncIterable<MapEntry> | Iterable<MapEntry>,
  image: Image,
  { output }: CommandContext,
): Promise<void> {
  printLine(output, mapRow("Offset", "Length", "Mapped to", "File"));
  for await (const entry of entries) {
    if (!entry.data) continue;
    if (entry.offset === undefined) throw noPlaceError(image, entry);
    if (entry.zero) continue;
    const layer = layerAt(image, entry.depth);
    const file = layer instanceof Qcow2Image ? layer.dataName : layer.path;
    printLine(output, mapRow(qemuHex(entry.start), qemuHex(entry.length), qemuHex(entry.offset), file));
  }
}

function mapRow(offset: string, length: string, mappedTo: string, file: string): string {
  return `${offset.padEnd(16)}${length.padEnd(16)}${mappedTo.padEnd(16)}${file}`;
}

/**
 * QEMU asks layer by layer and stops where one knows the answer. A layer without data whose backing file ends
 * before the range, or that has none, knows it: zeroes, which no layer holds. That layer's depth is what it shows.
 */
function asQemuShowsIt(entry: MapEntry, image: MappedImage): MapEntry {
  const provider = entry.present ? entry.depth : Infinity;
  let depth = 0;
  for (let layer = image.backing; depth < provider; layer = layer.backing) {
    if (layer === null || endOfLastSector(layer) <= entry.start) return { ...entry, present: false, depth };
    depth++;
  }
  return entry;
}

function layerAt(image: Image, depth: number): Image {
  let layer = image;
  for (let level = 0; level < depth && layer.backing !== null; level++) layer = layer.backing;
  return layer;
}

function noPlaceError(image: Image, { start, depth }: MapEntry): CowcatcherError {
  return new CowcatcherError({
    code: "UNSUPPORTED",
    object: layerAt(image, depth).path,
    problem: "holds compressed clusters, which have no plain place in the file",
    hint: "use --json",
    offsetBytes: start,
  });
}
