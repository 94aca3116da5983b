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

import { MAX_POOLED_BYTES, SLAB_BYTES } from "./limits.js";

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

  /** A slab of at least `minimumBytes`, with no references. */
  take(minimumBytes: number): Slab {
    let capacityBytes = SLAB_BYTES;
    while (capacityBytes < minimumBytes) capacityBytes *= 2;
    const slab = this.free.get(capacityBytes)?.pop();
    if (slab === undefined) return new Slab(capacityBytes);
    this.pooledBytes -= capacityBytes;
    return slab;
  }

  give(slab: Slab): void {
    if (this.pooledBytes + slab.capacityBytes > MAX_POOLED_BYTES) return;
    const list = this.free.get(slab.capacityBytes);
    if (list === undefined) this.free.set(slab.capacityBytes, [slab]);
    else list.push(slab);
    this.pooledBytes += slab.capacityBytes;
  }
}
