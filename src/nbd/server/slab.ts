// Slabs: the large recycled buffers that requests arrive in and replies leave from.
//
// A slab is filled from its start like a stack. Whoever still needs bytes in it (a device that writes them, a
// device that reads into them, the socket that sends them) holds a reference; only a slab with none is filled from
// its start again or returned to the pool. Payloads are therefore used where they arrived, and never copied.
//
// Slabs are recycled because the addresses of their bytes then stay known to the native calls and their pages
// stay in the processor's cache. The pool is only a cache: it bounds what is kept, not what is in use. What is in
// use is bounded by each connection (limits.ts).
//
// Main thread only.

import { MAX_POOLED_BYTES, MAX_SLAB_BYTES_IN_USE, SLAB_BYTES } from "./limits.js";

export class Slab {
  readonly bytes: Buffer;
  readonly view: DataView;
  readonly capacityBytes: number;
  references = 0;

  constructor(capacityBytes: number) {
    this.bytes = Buffer.allocUnsafeSlow(capacityBytes);
    this.view = new DataView(this.bytes.buffer, this.bytes.byteOffset, capacityBytes);
    this.capacityBytes = capacityBytes;
  }
}

export class SlabPool {
  /** Free slabs by capacity. Capacities are SLAB_BYTES times a power of two, so there are few lists. */
  private readonly free = new Map<number, Slab[]>();
  private pooledBytes = 0;
  /** Capacity of the slabs that are out. */
  inUseBytes = 0;

  constructor(private readonly maxInUseBytes = MAX_SLAB_BYTES_IN_USE) {}

  /** So much is out that a connection is to wait for its own slabs before it takes more. */
  get isExhausted(): boolean {
    return this.inUseBytes >= this.maxInUseBytes;
  }

  /** A slab of at least `minimumBytes`, with no references. */
  take(minimumBytes: number): Slab {
    let capacityBytes = SLAB_BYTES;
    while (capacityBytes < minimumBytes) capacityBytes *= 2;
    this.inUseBytes += capacityBytes;
    const slab = this.free.get(capacityBytes)?.pop();
    if (slab === undefined) return new Slab(capacityBytes);
    this.pooledBytes -= capacityBytes;
    return slab;
  }

  give(slab: Slab): void {
    this.inUseBytes -= slab.capacityBytes;
    if (this.pooledBytes + slab.capacityBytes > MAX_POOLED_BYTES) return;
    const list = this.free.get(slab.capacityBytes);
    if (list === undefined) this.free.set(slab.capacityBytes, [slab]);
    else list.push(slab);
    this.pooledBytes += slab.capacityBytes;
  }
}
