// One disk's fleecing file, as seen from outside: how large it is, and which chunks QEMU has captured from. Main thread.
//
// The file is QEMU's: its copy-before-write node writes clusters of T0 into it, and punches out what the workers
// discard. What is asked here is the file system: st_blocks for the size, SEEK_DATA for the order in which workers
// should read. On some file systems (tmpfs) captured zeroes are allocated and yet no data for SEEK_DATA: they are
// read when the sweep comes to them. Nothing depends on it that the backup shows; the snapshot itself knows what it is.
//
// Growth between two looks cannot be seen and must not pass the limit either: what the file grew by since the last
// look is taken as what it may grow by until the next.

import { closeSync, fstatSync, ftruncateSync, statfsSync, writeSync } from "node:fs";
import { ENXIO, libc } from "../native/libc.js";
import type { Geometry } from "../cow/geometry.js";

const STAT_BLOCK_BYTES = 512;
/** Whose SEEK_DATA goes by blocks of 4 KiB: ext4, XFS, btrfs, tmpfs. statfs(2), f_type. */
const PLAIN_FILE_SYSTEMS = new Set([0xef53, 0x58465342, 0x9123683e, 0x01021994]);
/** Of one look: a file with more pieces is looked at further next time. */
const RUNS_PER_LOOK = 4096;

export class Fleece {
  readonly path: string;
  readonly #fd: number;
  /** By chunk: it stands in the urgent ring already, or has. */
  #told = new Uint8Array(0);
  #lookFrom = 0;
  usedBytes = 0;
  usedBytesMax = 0;
  /** Bytes that QEMU has captured, as far as looks can tell: what was captured and discarded between two is not seen. */
  capturedBytes = 0;
  /** What usedBytes may be at the next look. */
  expectedBytes = 0;

  constructor({ path, fd }: { path: string; fd: number }) {
    this.path = path;
    this.#fd = fd;
  }

  /** Notes the file's size, and tells of chunks that have data in it, each once. Synchronous: some system calls. */
  look(geometry: Geometry, tell: (chunk: number) => void): void {
    const usedBytes = fstatSync(this.#fd).blocks * STAT_BLOCK_BYTES;
    const growth = Math.max(0, usedBytes - this.usedBytes);
    this.capturedBytes += growth;
    this.usedBytes = usedBytes;
    this.usedBytesMax = Math.max(this.usedBytesMax, usedBytes);
    this.expectedBytes = usedBytes + growth;
    if (usedBytes > 0) this.#findCaptured(geometry, tell);
  }

  #findCaptured({ chunkBytes, chunkCount }: Geometry, tell: (chunk: number) => void): void {
    if (libc === null) return;
    if (this.#told.length !== chunkCount) this.#told = new Uint8Array(chunkCount);
    let at = this.#lookFrom;
    for (let i = 0; i < RUNS_PER_LOOK; i++) {
      // Of a chunk that has been told of nothing more is to be known: no question for it, of which there would be 20,000 a second.
      const untold = this.#told.indexOf(0, Math.floor(at / chunkBytes));
      if (untold < 0) {
        at = 0;
        break;
      }
      at = Math.max(at, untold * chunkBytes);
      const start = libc.seekData(this.#fd, at);
      if (start < 0) {
        at = 0;
        break;
      }
      const chunk = Math.floor(start / chunkBytes);
      if (chunk >= chunkCount) break;
      if (this.#told[chunk] === 0) {
        this.#told[chunk] = 1;
        tell(chunk);
      }
      at = (chunk + 1) * chunkBytes;
    }
    this.#lookFrom = at;
  }

  /**
   * Whether its file system tells of each cluster of QEMU's by itself, and at once, if it has data. Tried out with one,
   * before anything stands in the file. Synchronous.
   */
  tellsClusters(clusterBytes: number): boolean {
    if (libc === null || !PLAIN_FILE_SYSTEMS.has(statfsSync(this.path).type)) return false;
    const { size, blksize, blocks } = fstatSync(this.#fd);
    // A tmpfs with huge pages (it tells of them so) has data for a whole one, or not, as memory is at hand.
    if (blksize > clusterBytes) return false;
    const at = Math.floor(size / clusterBytes / 2) * clusterBytes;
    if (at === 0 || size < at + 2 * clusterBytes) return false;
    writeSync(this.#fd, new Uint8Array(clusterBytes).fill(1), 0, clusterBytes, at);
    const isExact = libc.seekData(this.#fd, 0) === at && libc.seekHole(this.#fd, at) === at + clusterBytes;
    // XFS with an extent size hint allocates more than is written: what is read of that would be data one day.
    const grownBytes = (fstatSync(this.#fd).blocks - blocks) * STAT_BLOCK_BYTES;
    const isPunched = libc.punchHole(this.#fd, at, clusterBytes) === 0;
    return isExact && grownBytes < 2 * clusterBytes && isPunched && libc.seekData(this.#fd, 0) === -ENXIO;
  }

  /** For readers; it stays open until `close`. */
  get fd(): number {
    return this.#fd;
  }

  /** QEMU has let go of it. */
  empty(): void {
    ftruncateSync(this.#fd, 0);
    this.usedBytes = 0;
  }

  close(): void {
    closeSync(this.#fd);
  }
}
