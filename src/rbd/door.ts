// The door to one open image: what all threads that use its handle have in common, in shared memory.
//
// librbd's handle may be used by every thread of the process until it is closed, and by none after that. So whoever uses
// it enters first and leaves when it makes no further call; the keeper (keeper-thread.ts), who closes it, shuts the
// door, waits until all have left, and closes then. A thread that died inside never leaves: then the handle is left open,
// which costs memory and harms nobody.
//
//   word 0   how many are inside; with SHUT nobody enters any more
//   word 1   phase of a target: OPEN ──keeper──► COMMITTED, or OPEN ──main──► CANCELLED; whoever comes first wins
//   word 2   how many orphans there are: native buffers of reads that went on when their reader left. librbd writes into
//            them until the image is closed; then the keeper frees them
//   from byte 16 on: the orphans' addresses

const SHUT = 2 ** 30;
const WORD_INSIDE = 0;
const WORD_PHASE = 1;
const WORD_ORPHANS = 2;
const ORPHANS_AT = 16;
/** More than 64 workers with 8 reads in flight each. A buffer beyond that is never freed. */
const MAX_ORPHANS = 1024;

export const PHASE_OPEN = 0;
export const PHASE_COMMITTED = 1;
export const PHASE_CANCELLED = 2;

export function createDoorMemory(): SharedArrayBuffer {
  return new SharedArrayBuffer(ORPHANS_AT + MAX_ORPHANS * BigUint64Array.BYTES_PER_ELEMENT);
}

/** One thread's view. */
export class Door {
  readonly #words: Int32Array;
  readonly #orphans: BigUint64Array;

  constructor(memory: SharedArrayBuffer) {
    this.#words = new Int32Array(memory, 0, ORPHANS_AT / Int32Array.BYTES_PER_ELEMENT);
    this.#orphans = new BigUint64Array(memory, ORPHANS_AT, MAX_ORPHANS);
  }

  /** False: the door is shut. Each true needs a leave(). */
  enter(): boolean {
    if ((Atomics.add(this.#words, WORD_INSIDE, 1) & SHUT) === 0) return true;
    this.leave();
    return false;
  }

  leave(): void {
    Atomics.sub(this.#words, WORD_INSIDE, 1);
    Atomics.notify(this.#words, WORD_INSIDE);
  }

  /** Keeper: nobody enters from now on. @returns whether all have left in time; blocks the thread until then. */
  shut(limitMs: number): boolean {
    Atomics.or(this.#words, WORD_INSIDE, SHUT);
    const deadlineMs = performance.now() + limitMs;
    for (;;) {
      const inside = Atomics.load(this.#words, WORD_INSIDE);
      if (inside === SHUT) return true;
      const leftMs = deadlineMs - performance.now();
      if (leftMs <= 0) return false;
      Atomics.wait(this.#words, WORD_INSIDE, inside, leftMs);
    }
  }

  /** @returns whether the phase is the wanted one now: it was before, or was OPEN. */
  decide(phase: typeof PHASE_COMMITTED | typeof PHASE_CANCELLED): boolean {
    const found = Atomics.compareExchange(this.#words, WORD_PHASE, PHASE_OPEN, phase);
    return found === PHASE_OPEN || found === phase;
  }

  get isCancelled(): boolean {
    return Atomics.load(this.#words, WORD_PHASE) === PHASE_CANCELLED;
  }

  /** A native buffer that librbd may write to until the image is closed. */
  leaveBehind(address: bigint): void {
    const index = Atomics.add(this.#words, WORD_ORPHANS, 1);
    if (index < MAX_ORPHANS) this.#orphans[index] = address;
  }

  /** Keeper, after the image is closed. */
  takeOrphans(): bigint[] {
    const count = Math.min(Atomics.exchange(this.#words, WORD_ORPHANS, 0), MAX_ORPHANS);
    return Array.from(this.#orphans.subarray(0, count));
  }
}
