// Memory for chunks as objects, used again: one piece for each read that is under way at a time. New memory for each would
// cost a page fault every 4 KiB, and lie about until the collector comes. One thread.

export class ObjectMemory {
  readonly #idle: Buffer[] = [];

  /** @param bytes of each piece */
  constructor(private readonly bytes: number) {}

  /** Runs `use` with a piece that nobody else has meanwhile. */
  async with<Result>(use: (memory: Buffer) => Promise<Result>): Promise<Result> {
    const memory = this.#idle.pop() ?? Buffer.allocUnsafeSlow(this.bytes);
    try {
      return await use(memory);
    } finally {
      this.#idle.push(memory);
    }
  }
}
