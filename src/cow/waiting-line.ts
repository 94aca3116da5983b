/** First come, first served, in promises: who stands in line gets its turn when everybody before has left. */
export class WaitingLine {
  /** Fulfilled when the last in the line has left it. */
  #end: Promise<void> = Promise.resolve();
  #length = 0;

  /** Those in the line, the one whose turn it is included. */
  get length(): number {
    return this.#length;
  }

  /** Fulfilled when nobody stands before us, with what leaves the line (once). */
  async stand(): Promise<() => void> {
    const before = this.#end;
    let leave: () => void = () => {};
    this.#end = new Promise((resolve) => {
      leave = resolve;
    });
    this.#length++;
    await before;
    return () => {
      this.#length--;
      leave();
    };
  }
}
