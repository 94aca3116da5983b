// How a disk is cut: blocks of capture, clusters of state, chunks of work, regions of the sweep.

import { KiB, MiB, TiB } from "../units.js";

/** Unit of capture: the page size, below which neither the page cache nor O_DIRECT reads less. */
export const BLOCK_BYTES = 4 * KiB;
/** A slot is cut into this many blocks, so that small captures share it. */
export const BLOCKS_PER_SLOT = 16;
export const SLOT_BYTES = BLOCK_BYTES * BLOCKS_PER_SLOT;
export const MIN_CLUSTER_BYTES = 64 * KiB;
export const CHUNK_BYTES = 1 * MiB;

/** How finely a disk is cut, where neither source nor target ask for more: powers of two, in bytes. */
export interface Cut {
  clusterBytes: number;
  chunkBytes: number;
}

export const USUAL_CUT: Cut = { clusterBytes: MIN_CLUSTER_BYTES, chunkBytes: CHUNK_BYTES };
/**
 * Of a live backup without a buffer. There a guest's write waits until its clusters are in the target: what a cluster
 * holds beyond the write takes the target's time from the guest, and so does a chunk of the sweep that a worker has
 * begun. Finer still would cost memory for the states, and requests.
 */
export const FINE_CUT: Cut = { clusterBytes: 16 * KiB, chunkBytes: 256 * KiB };
/** Of larger disks the states alone would be over 1 GiB. */
export const FINE_CUT_MAX_DISK_BYTES = 16 * TiB;
/**
 * Of a copy that the main thread begins: while it writes one chunk, libuv's pool reads another, and each hand-over costs a
 * turn of the event loop.
 */
export const LONG_CUT: Cut = { clusterBytes: MIN_CLUSTER_BYTES, chunkBytes: 2 * MiB };
/** Chunks whose common emptiness one query settles: 256 MiB with chunks of 1 MiB. */
const CHUNKS_PER_REGION = 256;
/** Chunk numbers are 32-bit: 2^31 chunks of 1 MiB are 2 PiB, far over what qcow2 holds. */
const MAX_DISK_BYTES = 2 ** 50;

export interface Geometry {
  sizeBytes: number;
  clusterBytes: number;
  chunkBytes: number;
  clusterCount: number;
  chunkCount: number;
  chunksPerRegion: number;
  regionCount: number;
  clustersPerChunk: number;
  blocksPerChunk: number;
}

/** @throws as chunkedGeometryOf */
export function geometryOf(sizeBytes: number, ...clusterSizesBytes: number[]): Geometry {
  return chunkedGeometryOf(sizeBytes, USUAL_CUT, 0, ...clusterSizesBytes);
}

/**
 * @param wantedChunkBytes a power of two: the unit in which the target takes data best; smaller ones than the cut's do not count
 * @throws RangeError for a disk over 1 PiB: openers and creators refuse those by name long before.
 */
export function chunkedGeometryOf(
  sizeBytes: number,
  cut: Cut,
  wantedChunkBytes: number,
  ...clusterSizesBytes: number[]
): Geometry {
  if (!(sizeBytes >= 0 && sizeBytes <= MAX_DISK_BYTES)) throw new RangeError(`disk of ${sizeBytes} bytes`);
  const clusterBytes = Math.max(cut.clusterBytes, ...clusterSizesBytes);
  const chunkBytes = Math.max(cut.chunkBytes, wantedChunkBytes, clusterBytes);
  const chunkCount = Math.ceil(sizeBytes / chunkBytes);
  return {
    sizeBytes,
    clusterBytes,
    chunkBytes,
    clusterCount: Math.ceil(sizeBytes / clusterBytes),
    chunkCount,
    chunksPerRegion: CHUNKS_PER_REGION,
    regionCount: Math.ceil(chunkCount / CHUNKS_PER_REGION),
    clustersPerChunk: chunkBytes / clusterBytes,
    blocksPerChunk: chunkBytes / BLOCK_BYTES,
  };
}
