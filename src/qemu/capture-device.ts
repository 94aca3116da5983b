// What QEMU writes old data to, by the method `ring`: a device whose writes are captures. Main thread.
//
// For a disk of our own a guest's write comes to the interceptor, which reads the old data from the image. Here QEMU's
// copy-before-write filter has read it already: each write that arrives is the old data of the range, and the guest's
// own write follows when it is answered. So the interceptor is asked as ever, and what it reads is what has arrived:
//
//   QEMU ──write(old data)──► CaptureDevice ──beforeWrite(range)──► Interceptor ──read(range)──► the request's own buffer
//                                  └── answered when the interceptor lets the write go
//
// All that holds for a guest's write holds for the answer: it waits for a chunk that a worker has claimed, for room
// under the policy to wait, for the spill; never for the target unless there is no buffer. Once the interceptor is detached
// every write is answered at once and forgotten.
//
// QEMU's requests are whole clusters of 64 KiB, the last one cut to the disk's length, and none overlaps another that
// is in flight (block/block-copy.c).

import type { BlockDevice, BlockStatus, Completion } from "../block/device.js";
import type { Interceptor } from "../cow/interceptor.js";
import { CowcatcherError } from "../errors.js";

interface Arrived {
  offsetBytes: number;
  lengthBytes: number;
  /** Null: zeroes. */
  data: Uint8Array | null;
}

/** Where the interceptor finds old data. */
export class ArrivedData implements Pick<BlockDevice, "name" | "sizeBytes" | "read"> {
  /** As many as QEMU has requests in flight: 16 (MAX_NBD_REQUESTS). */
  readonly #inFlight = new Set<Arrived>();

  constructor(
    readonly name: string,
    readonly sizeBytes: number,
  ) {}

  begin(arrived: Arrived): () => void {
    this.#inFlight.add(arrived);
    return () => this.#inFlight.delete(arrived);
  }

  /** @throws CowcatcherError PROTOCOL where nothing has arrived: a part of a block would be kept for the whole */
  read(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    for (const { offsetBytes: start, lengthBytes: length, data } of this.#inFlight) {
      if (start > offsetBytes || start + length < offsetBytes + lengthBytes) continue;
      const from = offsetBytes - start;
      if (data === null) buffer.fill(0, bufferOffset, bufferOffset + lengthBytes);
      else buffer.set(data.subarray(from, from + lengthBytes), bufferOffset);
      return undefined;
    }
    throw new CowcatcherError({
      code: "PROTOCOL",
      object: this.name,
      problem: "QEMU has sent old data that is no whole block",
      offsetBytes,
    });
  }
}

export class CaptureDevice implements BlockDevice {
  readonly name: string;
  readonly sizeBytes: number;
  readonly readOnly = false;
  readonly clusterSizeBytes = 0;
  readonly #arrived: ArrivedData;
  readonly #interceptor: Pick<Interceptor, "beforeWrite">;

  constructor(arrived: ArrivedData, interceptor: Pick<Interceptor, "beforeWrite">) {
    this.name = arrived.name;
    this.sizeBytes = arrived.sizeBytes;
    this.#arrived = arrived;
    this.#interceptor = interceptor;
  }

  write(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    const data = buffer.subarray(bufferOffset, bufferOffset + lengthBytes);
    return this.#capture({ offsetBytes, lengthBytes, data });
  }

  writeZeroes(offsetBytes: number, lengthBytes: number): Completion {
    return this.#capture({ offsetBytes, lengthBytes, data: null });
  }

  #capture(arrived: Arrived): Completion {
    const forget = this.#arrived.begin(arrived);
    let wait: Completion;
    try {
      wait = this.#interceptor.beforeWrite(arrived.offsetBytes, arrived.lengthBytes);
    } catch (error) {
      forget();
      throw error;
    }
    if (wait) return wait.finally(forget);
    forget();
    return undefined;
  }

  /** Nobody does; and QEMU's filter does not read what it has written. */
  read(): Completion {
    return Promise.reject(
      new CowcatcherError({ code: "UNSUPPORTED", object: this.name, problem: "old data is not read here" }),
    );
  }

  discard(): Completion {
    return undefined;
  }

  flush(): Completion {
    return undefined;
  }

  blockStatus(_offsetBytes: number, lengthBytes: number): BlockStatus {
    return { lengthBytes, zero: false, data: true, depth: 0, present: true, compressed: false };
  }

  close(): Promise<void> {
    return Promise.resolve();
  }
}
