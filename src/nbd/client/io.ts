// Ranges of any size and alignment on an NBD connection: cut into requests that the server takes.
//
// Each range is split the same way: a head and a tail that end inside one of the server's blocks, and between them the
// body. The body goes in pieces, all in flight together, so that the server works on the next one while the last is
// on its way. Head and tail go block by block through memory of their own; to write one is to read it first, so the
// caller sees to it that nothing else writes to these two blocks meanwhile.

import { KiB, MiB, roundDown, roundUp } from "../../units.js";
import { CowcatcherError } from "../../errors.js";
import { MAX_RANGE_BYTES, type NbdClient } from "./client.js";

/** As nbdcopy's: large enough to make the work for each request small, small enough that several overlap. */
export const PIECE_BYTES = 256 * KiB;
/** Of zeroes: a server that has to write them answers in time all the same. */
const ZERO_PIECE_BYTES = 64 * MiB;
/** Of one range: a client takes a bounded number of requests from all who use it. */
const PIECES_IN_FLIGHT = 16;
const ZEROES = new Uint8Array(PIECE_BYTES);

/** The server's offer at the time of asking; `fast` is dropped for good once it said that it cannot. */
export interface ZeroPolicy {
  mayUnmap: boolean;
  fast: boolean;
}

/**
 * Calls `each` for [offset, +length) in pieces, some of them at a time; rejects with the first failure when none is in
 * flight, since a buffer must not go back to its owner before.
 */
async function inPieces(
  offsetBytes: number,
  lengthBytes: number,
  pieceBytes: number,
  each: (offsetBytes: number, lengthBytes: number) => Promise<void>,
): Promise<void> {
  if (lengthBytes <= 0) return;
  if (lengthBytes <= pieceBytes) return each(offsetBytes, lengthBytes);
  const end = offsetBytes + lengthBytes;
  let at = offsetBytes;
  let failure: { reason: unknown } | undefined;
  const oneAfterAnother = async (): Promise<void> => {
    while (at < end && failure === undefined) {
      const from = at;
      // Cut at multiples of the piece, so that pieces stay aligned whatever the start is.
      at = Math.min(end, roundDown(from, pieceBytes) + pieceBytes);
      try {
        await each(from, at - from);
      } catch (reason) {
        failure ??= { reason };
      }
    }
  };
  const laneCount = Math.min(PIECES_IN_FLIGHT, Math.ceil(lengthBytes / pieceBytes) + 1);
  await Promise.all(Array.from({ length: laneCount }, oneAfterAnother));
  if (failure !== undefined) throw failure.reason;
}

function pieceBytesOf(client: NbdClient): number {
  const { maximumPayloadBytes, minimumBlockBytes } = client.info;
  return Math.max(
    minimumBlockBytes,
    roundDown(Math.min(PIECE_BYTES, maximumPayloadBytes), minimumBlockBytes),
  );
}

/** [start, bodyStart) head, [bodyStart, bodyEnd) body, [bodyEnd, end) tail; a range within one block is all head. */
function split(client: NbdClient, start: number, end: number): { bodyStart: number; bodyEnd: number } {
  const unit = client.info.minimumBlockBytes;
  const bodyStart = Math.min(roundUp(start, unit), end);
  return { bodyStart, bodyEnd: Math.max(bodyStart, roundDown(end, unit)) };
}

/** Whether a write of this range reads the blocks at its ends first. */
export function hasEdges(client: NbdClient, offsetBytes: number, lengthBytes: number): boolean {
  const unit = client.info.minimumBlockBytes;
  return unit > 1 && (offsetBytes % unit !== 0 || lengthBytes % unit !== 0);
}

/** Fills buffer[bufferOffset, +lengthBytes). Rejects as NbdClient.read. */
export function readRange(
  client: NbdClient,
  buffer: Uint8Array,
  bufferOffset: number,
  lengthBytes: number,
  offsetBytes: number,
): Promise<void> {
  const pieceBytes = pieceBytesOf(client);
  const shift = bufferOffset - offsetBytes;
  if (!hasEdges(client, offsetBytes, lengthBytes)) {
    return inPieces(offsetBytes, lengthBytes, pieceBytes, (at, length) =>
      client.read(buffer, at + shift, length, at),
    );
  }
  return readWithEdges(client, buffer, shift, offsetBytes, offsetBytes + lengthBytes);
}

async function readWithEdges(
  client: NbdClient,
  buffer: Uint8Array,
  shift: number,
  start: number,
  end: number,
): Promise<void> {
  const { bodyStart, bodyEnd } = split(client, start, end);
  await inPieces(bodyStart, bodyEnd - bodyStart, pieceBytesOf(client), (at, length) =>
    client.read(buffer, at + shift, length, at),
  );
  for (const [from, to] of edges(start, bodyStart, bodyEnd, end)) {
    const { block, blockStart } = await readBlock(client, from);
    buffer.set(block.subarray(from - blockStart, to - blockStart), from + shift);
  }
}

function edges(start: number, bodyStart: number, bodyEnd: number, end: number): [number, number][] {
  const pairs: [number, number][] = [
    [start, bodyStart],
    [bodyEnd, end],
  ];
  return pairs.filter(([from, to]) => from < to);
}

async function readBlock(
  client: NbdClient,
  offsetBytes: number,
): Promise<{ block: Uint8Array; blockStart: number }> {
  const { minimumBlockBytes } = client.info;
  const blockStart = roundDown(offsetBytes, minimumBlockBytes);
  const block = new Uint8Array(minimumBlockBytes);
  await client.read(block, 0, minimumBlockBytes, blockStart);
  return { block, blockStart };
}

/** Writes buffer[bufferOffset, +lengthBytes). Rejects as NbdClient.write. */
export async function writeRange(
  client: NbdClient,
  buffer: Uint8Array,
  bufferOffset: number,
  lengthBytes: number,
  offsetBytes: number,
): Promise<void> {
  const shift = bufferOffset - offsetBytes;
  const end = offsetBytes + lengthBytes;
  const { bodyStart, bodyEnd } = split(client, offsetBytes, end);
  await inPieces(bodyStart, bodyEnd - bodyStart, pieceBytesOf(client), (at, length) =>
    client.write(buffer, at + shift, length, at),
  );
  for (const [from, to] of edges(offsetBytes, bodyStart, bodyEnd, end)) {
    await patchBlock(client, from, buffer.subarray(from + shift, to + shift));
  }
}

async function patchBlock(client: NbdClient, offsetBytes: number, data: Uint8Array): Promise<void> {
  const { block, blockStart } = await readBlock(client, offsetBytes);
  block.set(data, offsetBytes - blockStart);
  await client.write(block, 0, block.length, blockStart);
}

/** The range reads as zeroes afterwards. Rejects as NbdClient.writeZeroes. */
export async function zeroRange(
  client: NbdClient,
  offsetBytes: number,
  lengthBytes: number,
  policy: ZeroPolicy,
): Promise<void> {
  const end = offsetBytes + lengthBytes;
  const { bodyStart, bodyEnd } = split(client, offsetBytes, end);
  if (client.canWriteZeroes) {
    await inPieces(bodyStart, bodyEnd - bodyStart, ZERO_PIECE_BYTES, (at, length) =>
      zeroPiece(client, at, length, policy),
    );
  } else {
    await inPieces(bodyStart, bodyEnd - bodyStart, pieceBytesOf(client), (at, length) =>
      client.write(ZEROES.length >= length ? ZEROES : new Uint8Array(length), 0, length, at),
    );
  }
  for (const [from, to] of edges(offsetBytes, bodyStart, bodyEnd, end)) {
    await patchBlock(client, from, new Uint8Array(to - from));
  }
}

async function zeroPiece(client: NbdClient, offsetBytes: number, lengthBytes: number, policy: ZeroPolicy) {
  const { mayUnmap } = policy;
  if (policy.fast && client.canZeroFast) {
    try {
      await client.writeZeroes(offsetBytes, lengthBytes, { mayUnmap, fast: true });
      return;
    } catch (error) {
      if (isRefused(error, "ENOTSUP")) policy.fast = false;
      else if (!isRefused(error, "EOVERFLOW", "EINVAL")) throw error;
    }
  }
  try {
    await client.writeZeroes(offsetBytes, lengthBytes, { mayUnmap });
  } catch (error) {
    // The protocol lets a server refuse what is longer than the most data in one request.
    const { maximumPayloadBytes } = client.info;
    if (lengthBytes <= maximumPayloadBytes || !isRefused(error, "EOVERFLOW", "EINVAL")) throw error;
    await inPieces(offsetBytes, lengthBytes, maximumPayloadBytes, (at, length) =>
      client.writeZeroes(at, length, { mayUnmap }),
    );
  }
}

function isRefused(error: unknown, ...errnos: string[]): boolean {
  return error instanceof CowcatcherError && error.errno !== undefined && errnos.includes(error.errno);
}

/** Advice on the whole blocks within the range. */
export function trimRange(client: NbdClient, offsetBytes: number, lengthBytes: number): Promise<void> {
  const { bodyStart, bodyEnd } = split(client, offsetBytes, offsetBytes + lengthBytes);
  return inPieces(bodyStart, bodyEnd - bodyStart, MAX_RANGE_BYTES, (at, length) => client.trim(at, length));
}
