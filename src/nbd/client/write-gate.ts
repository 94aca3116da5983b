// Lets writes run side by side, except those that must run alone. First come, first served, so that none waits for
// ever. One event loop.

interface Waiting {
  alone: boolean;
  start: () => void;
}

export class WriteGate {
  #runningCount = 0;
  #isAlone = false;
  readonly #queue: Waiting[] = [];

  async run<T>(alone: boolean, work: () => Promise<T>): Promise<T> {
    if (this.#queue.length > 0 || !this.#canStart(alone)) {
      await new Promise<void>((start) => this.#queue.push({ alone, start }));
    } else {
      this.#enter(alone);
    }
    try {
      return await work();
    } finally {
      this.#runningCount--;
      this.#isAlone = false;
      this.#next();
    }
  }

  #canStart(alone: boolean): boolean {
    return alone ? this.#runningCount === 0 : !this.#isAlone;
  }

  #enter(alone: boolean): void {
    this.#runningCount++;
    this.#isAlone = alone;
  }

  #next(): void {
    for (;;) {
      const first = this.#queue[0];
      if (first === undefined || !this.#canStart(first.alone)) return;
      this.#queue.shift();
      this.#enter(first.alone);
      first.start();
    }
  }
}
