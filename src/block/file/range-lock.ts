// Ranges of a file that somebody holds against others. Overlapping holders follow each other in the order in which they
// asked, so none starves and none deadlocks. Main thread only.

export interface HeldRange {
  readonly from: number;
  readonly end: number;
  /** Of those who wait for its release. */
  onReleased: (() => void)[] | null;
}

export class RangeLock {
  private readonly held = new Set<HeldRange>();

  /** [from, end), if nobody holds a part of it or waits for one. */
  tryHold(from: number, end: number): HeldRange | undefined {
    for (const range of this.held) if (range.from < end && from < range.end) return undefined;
    return this.add(from, end);
  }

  /** Resolves once every earlier holder of an overlapping range has released it. */
  async hold(from: number, end: number): Promise<HeldRange> {
    const earlier: Promise<void>[] = [];
    for (const range of this.held) {
      if (range.from < end && from < range.end) earlier.push(whenReleased(range));
    }
    const mine = this.add(from, end);
    await Promise.all(earlier);
    return mine;
  }

  release(range: HeldRange): void {
    this.held.delete(range);
    if (range.onReleased !== null) for (const goOn of range.onReleased) goOn();
  }

  private add(from: number, end: number): HeldRange {
    const mine: HeldRange = { from, end, onReleased: null };
    this.held.add(mine);
    return mine;
  }
}

function whenReleased(range: HeldRange): Promise<void> {
  return new Promise((resolve) => {
    (range.onReleased ??= []).push(resolve);
  });
}
