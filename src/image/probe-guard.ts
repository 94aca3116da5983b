// Keeps a probed raw image raw (CLI.md, Safety; QEMU: block/raw-format.c).
//
// Who opens an image without naming its format believes its first sector. A guest that wrote a qcow2 header there,
// with a backing file of its choice, would be believed at the next start and could read any file of the host. So
// for a probed raw image a copy of the first sector is kept as the writes so far have made it, each write is laid
// over it, and one whose outcome would be probed as something other than raw is refused before a byte is written.
//
// Main thread. `admit` and the write that it admits must follow each other without another write to the sector
// in between; an admitted write that failed makes the copy stale, and the next `admit` reads the sector anew.

import { CowcatcherError } from "../errors.js";
import { PROBE_BYTES, probeSignature } from "./probe.js";

export class ProbeGuard {
  private sector: Uint8Array;
  private isStale = false;

  /** @param readSector reads the image's first PROBE_BYTES, or all of a smaller image. */
  constructor(
    private readonly name: string,
    private readonly readSector: () => Uint8Array,
  ) {
    this.sector = readSector();
  }

  /**
   * Takes note of a write of buffer[bufferOffset, +lengthBytes) at offsetBytes; `null` writes zeroes.
   * @throws CowcatcherError with errno EPERM where the sector would announce a format.
   */
  admit(buffer: Uint8Array | null, bufferOffset: number, lengthBytes: number, offsetBytes: number): void {
    if (offsetBytes >= PROBE_BYTES) return;
    if (this.isStale) {
      this.sector = this.readSector();
      this.isStale = false;
    }
    const outcome = this.sector.slice();
    const count = Math.min(lengthBytes, outcome.length - offsetBytes);
    if (buffer === null) outcome.fill(0, offsetBytes, offsetBytes + count);
    else outcome.set(buffer.subarray(bufferOffset, bufferOffset + count), offsetBytes);
    const format = probeSignature(outcome);
    if (format !== "raw") throw this.refusal(format, offsetBytes);
    this.sector = outcome;
  }

  markStale(): void {
    this.isStale = true;
  }

  private refusal(format: string, offsetBytes: number): CowcatcherError {
    return new CowcatcherError({
      code: "IO",
      object: this.name,
      problem: `the write would make this raw image look like '${format}', and its format was probed`,
      hint: "name the format with -f raw to allow it",
      offsetBytes,
      errno: "EPERM",
    });
  }
}
