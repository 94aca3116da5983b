// Whether two images have the same content for the guest, as `qemu-img compare` decides it.
//
// Both are walked side by side, in runs over which neither changes its status. Runs that read as zeroes in both
// are skipped; where one is zero, the other alone is read; only where both may hold data are both read. Past the
// end of the shorter image the longer one must read as zeroes, unless `strict`, where sizes and allocation
// must be equal too. Memory: two buffers of COMPARE_PIECE_BYTES. Main thread; the event loop runs between pieces.

import { MiB } from "../units.js";
import type { BlockDevice, BlockStatus } from "../block/device.js";
import { endOfLastSector } from "./last-sector.js";

export const COMPARE_PIECE_BYTES = 1 * MiB;
/** So that an image whose data is all cached does not hold up the event loop; holes are not counted. */
const PIECES_PER_TURN = 8;

export interface CompareOptions {
  /** As qemu-img compare -s: sizes and allocation must agree too. */
  strict?: boolean | undefined;
  /** Bytes of the disk compared so far, and in all. */
  onProgress?: ((doneBytes: number, totalBytes: number) => void) | undefined;
}

export interface CompareResult {
  same: boolean;
  /** What differs first: the content, the allocation or the size (the latter two in strict mode only). */
  difference: "content" | "status" | "size" | null;
  /** Exact byte of the first difference in content (QEMU rounds down to 512); start of the run for "status". */
  offsetBytes: number | null;
  /** The sizes differ, which is worth a warning even where the images are the same. */
  sizesDiffer: boolean;
}

/** The two sides' bytes of one piece. A device that reads as zeroes there is not read. */
interface Side {
  device: BlockDevice;
  buffer: Buffer;
}

/** @throws CowcatcherError IO or FORMAT from either image. */
export async function compareImages(
  a: BlockDevice,
  b: BlockDevice,
  { strict = false, onProgress }: CompareOptions = {},
): Promise<CompareResult> {
  const sizesDiffer = endOfLastSector(a) !== endOfLastSector(b);
  if (strict && sizesDiffer) return { same: false, difference: "size", offsetBytes: null, sizesDiffer };
  const totalBytes = Math.max(a.sizeBytes, b.sizeBytes);
  const left: Side = { device: a, buffer: Buffer.alloc(COMPARE_PIECE_BYTES) };
  const right: Side = { device: b, buffer: Buffer.alloc(COMPARE_PIECE_BYTES) };
  let offset = 0;
  let pieceCount = 0;
  while (offset < totalBytes) {
    const leftStatus = await statusAt(a, offset, totalBytes);
    const rightStatus = await statusAt(b, offset, totalBytes);
    if (strict && !isSameAllocation(leftStatus, rightStatus)) {
      return { same: false, difference: "status", offsetBytes: offset, sizesDiffer };
    }
    const runEnd = offset + Math.min(leftStatus.lengthBytes, rightStatus.lengthBytes);
    const isLeftZero = readsAsZero(leftStatus);
    const isRightZero = readsAsZero(rightStatus);
    if (isLeftZero && isRightZero) offset = runEnd;
    while (offset < runEnd) {
      const pieceBytes = Math.min(COMPARE_PIECE_BYTES, runEnd - offset);
      await load(left, isLeftZero, pieceBytes, offset);
      await load(right, isRightZero, pieceBytes, offset);
      const differsAt = firstDifference(left.buffer, right.buffer, pieceBytes);
      if (differsAt >= 0) {
        return { same: false, difference: "content", offsetBytes: offset + differsAt, sizesDiffer };
      }
      offset += pieceBytes;
      onProgress?.(offset, totalBytes);
      if (++pieceCount % PIECES_PER_TURN === 0) await turnOfTheEventLoop();
    }
    onProgress?.(offset, totalBytes);
  }
  return { same: true, difference: null, offsetBytes: null, sizesDiffer };
}

/** What lies past a device's end reads as zeroes; the rest of its last sector counts as its own. */
function statusAt(
  device: BlockDevice,
  offsetBytes: number,
  totalBytes: number,
): BlockStatus | Promise<BlockStatus> {
  if (offsetBytes < device.sizeBytes) return device.blockStatus(offsetBytes, device.sizeBytes - offsetBytes);
  const inLastSector = endOfLastSector(device) - offsetBytes;
  return {
    lengthBytes: Math.min(inLastSector > 0 ? inLastSector : Infinity, totalBytes - offsetBytes),
    zero: true,
    data: false,
    depth: 0,
    present: inLastSector > 0,
    compressed: false,
  };
}

function readsAsZero(status: BlockStatus): boolean {
  return status.zero || !status.present;
}

function isSameAllocation(a: BlockStatus, b: BlockStatus): boolean {
  return (
    a.data === b.data &&
    readsAsZero(a) === readsAsZero(b) &&
    a.present === b.present &&
    // What is compressed in one and plain in the other is stored differently.
    (a.hostOffsetBytes === undefined) === (b.hostOffsetBytes === undefined)
  );
}

async function load(side: Side, isZero: boolean, lengthBytes: number, offsetBytes: number): Promise<void> {
  if (isZero) {
    side.buffer.fill(0, 0, lengthBytes);
    return;
  }
  const completion = side.device.read(side.buffer, 0, lengthBytes, offsetBytes);
  if (completion !== undefined) await completion;
}

/** @returns the index of the first byte that differs, or -1. */
function firstDifference(a: Buffer, b: Buffer, lengthBytes: number): number {
  if (a.compare(b, 0, lengthBytes, 0, lengthBytes) === 0) return -1;
  let index = 0;
  while (a[index] === b[index]) index++;
  return index;
}

function turnOfTheEventLoop(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve));
}
