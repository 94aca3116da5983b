// The limit of a guest write's wait for the spill's storage, which may not answer at all.
//
// One timer for all waits: under a full buffer each guest write has one, many thousands a second, of which hardly any
// ever comes to its limit. Main thread only.

export interface LimitClock {
  /** Monotonic, in milliseconds. */
  nowMs(): number;
  sleep(ms: number): Promise<void>;
}

interface Wait {
  endMs: number;
  giveUp: () => void;
}

export class GuestLimit {
  readonly #limitMs: number;
  readonly #recheckMs: number;
  readonly #clock: LimitClock;
  readonly #waits = new Set<Wait>();
  #isWatching = false;

  /** @param recheckMs how much later than its end a wait may be given up */
  constructor(limitMs: number, recheckMs: number, clock: LimitClock) {
    this.#limitMs = limitMs;
    this.#recheckMs = recheckMs;
    this.#clock = clock;
  }

  /**
   * Whether `work` lasts longer than the limit, counted from startMs. False when it is over. Rejects as `work`; not once
   * it was given up.
   */
  async isExceededBy(work: Promise<void>, startMs: number): Promise<boolean> {
    let giveUp: () => void = () => {};
    const givenUp = new Promise<true>((resolve) => {
      giveUp = () => resolve(true);
    });
    const wait: Wait = { endMs: startMs + this.#limitMs, giveUp };
    this.#waits.add(wait);
    if (!this.#isWatching) void this.#watch();
    try {
      return await Promise.race([work.then(() => false), givenUp]);
    } finally {
      this.#waits.delete(wait);
    }
  }

  async #watch(): Promise<void> {
    this.#isWatching = true;
    while (this.#waits.size > 0) {
      await this.#clock.sleep(this.#recheckMs);
      const nowMs = this.#clock.nowMs();
      for (const { endMs, giveUp } of this.#waits) if (nowMs > endMs) giveUp();
    }
    this.#isWatching = false;
  }
}
