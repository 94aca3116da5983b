// When a guest's writes were answered: counts by slots of equal length, from its first write on. Memory is bounded: when
// the slots are used up, each two become one of twice the length, so that a run of any length has MAX_SLOTS / 2 or more.

const MAX_SLOTS = 600;
const FIRST_SLOT_MS = 50;

export interface TimelineFigures {
  slotMs: number;
  /** Writes answered in each slot; the last one may not be over. */
  writes: number[];
  /** From the first write on, in milliseconds; undefined: no backup. */
  t0Ms: number | undefined;
  /** When the backup was over. */
  endMs: number | undefined;
  /** When the guest stopped. */
  lengthMs: number;
}

export class Timeline {
  readonly #startMs: number;
  #slotMs = FIRST_SLOT_MS;
  #writes: number[] = [];
  #t0Ms: number | undefined;
  #endMs: number | undefined;

  constructor(startMs: number) {
    this.#startMs = startMs;
  }

  record(nowMs: number): void {
    let slot = Math.floor((nowMs - this.#startMs) / this.#slotMs);
    while (slot >= MAX_SLOTS) {
      this.#halve();
      slot = Math.floor((nowMs - this.#startMs) / this.#slotMs);
    }
    while (this.#writes.length <= slot) this.#writes.push(0);
    this.#writes[slot] = (this.#writes[slot] ?? 0) + 1;
  }

  markT0(nowMs: number): void {
    this.#t0Ms = nowMs - this.#startMs;
  }

  markEnd(nowMs: number): void {
    this.#endMs = nowMs - this.#startMs;
  }

  figures(nowMs: number): TimelineFigures {
    const lengthMs = nowMs - this.#startMs;
    return {
      slotMs: this.#slotMs,
      writes: [...this.#writes],
      t0Ms: this.#t0Ms,
      endMs: this.#endMs,
      lengthMs,
    };
  }

  #halve(): void {
    const wider: number[] = [];
    for (let slot = 0; slot < this.#writes.length; slot += 2) {
      wider.push((this.#writes[slot] ?? 0) + (this.#writes[slot + 1] ?? 0));
    }
    this.#writes = wider;
    this.#slotMs *= 2;
  }
}

/** Writes a second in each of `count` equal parts of the guest's time. */
export function ratesOf({ slotMs, writes, lengthMs }: TimelineFigures, count: number): number[] {
  const partMs = Math.max(lengthMs, 1) / count;
  return Array.from({ length: count }, (_, part) => {
    const [from, to] = [part * partMs, (part + 1) * partMs];
    let sum = 0;
    for (let slot = Math.floor(from / slotMs); slot * slotMs < to && slot < writes.length; slot++) {
      const start = slot * slotMs;
      // The last slot is as long as the guest wrote in it.
      const end = Math.min(start + slotMs, Math.max(lengthMs, start + 1));
      const overlapMs = Math.min(end, to) - Math.max(start, from);
      sum += ((writes[slot] ?? 0) * Math.max(0, overlapMs)) / (end - start);
    }
    return (sum * 1000) / partMs;
  });
}
