// The head of a tracking folder that is in use: one change after another, each durable when it is told so. The last that
// may be written is that the tracking was given up. Main thread.

import type { TrackingFile, TrackingFolder } from "./folder.js";
import { copyOffset, encodeHead, type Head, HEAD_NAME } from "./head.js";
import type { Logger } from "../log.js";

export class HeadKeeper {
  #head: Head;
  #order: Promise<void> = Promise.resolve();
  #isLost = false;

  constructor(
    head: Head,
    private readonly file: TrackingFile,
  ) {
    this.#head = head;
  }

  /** As it is on the medium. */
  get head(): Readonly<Head> {
    return this.#head;
  }

  /** Nothing is written once the tracking is given up. @throws CowcatcherError IO */
  async write(change: Partial<Head>): Promise<void> {
    const work = async (): Promise<void> => {
      if (!this.#isLost) await this.#write(change);
    };
    await this.#inOrder(work);
  }

  /** Nobody will believe what the folder holds, or nothing can be done about that. Never rejects. */
  async markLost(folder: TrackingFolder, logger: Pick<Logger, "warn">): Promise<void> {
    this.#isLost = true;
    try {
      await this.#inOrder(() => this.#write({ state: "lost" }));
    } catch {
      await folder
        .remove(HEAD_NAME)
        .catch((error: unknown) =>
          logger.warn({ err: error }, "remove the tracking folder before this disk is served again"),
        );
    }
  }

  async idle(): Promise<void> {
    await this.#order;
  }

  close(): Promise<void> {
    return this.file.close();
  }

  async #write(change: Partial<Head>): Promise<void> {
    const head = { ...this.#head, ...change, sequence: this.#head.sequence + 1 };
    await this.file.writeDurably(encodeHead(head), copyOffset(head));
    this.#head = head;
  }

  #inOrder(work: () => Promise<void>): Promise<void> {
    const result = this.#order.then(work);
    this.#order = result.catch(() => undefined);
    return result;
  }
}
