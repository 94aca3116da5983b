import type { Socket } from "node:net";
import { CowcatcherError } from "../../errors.js";

/** Reads exact counts of bytes from a socket in paused mode, one read at a time. */
export class SocketReader {
  #wake: (() => void) | undefined;
  #failure: unknown;
  #isEnded = false;
  readonly #onReadable = (): void => this.#wake?.();
  readonly #onEnd = (): void => {
    this.#isEnded = true;
    this.#wake?.();
  };
  readonly #onError = (error: Error): void => {
    this.#failure = error;
    this.#onEnd();
  };

  constructor(
    private readonly socket: Socket,
    private readonly object: string,
  ) {
    socket.on("readable", this.#onReadable);
    socket.on("end", this.#onEnd);
    socket.on("error", this.#onError);
    socket.on("close", this.#onEnd);
  }

  /** @param atEnd what an end of the connection before the first byte means, if it means something */
  async read(lengthBytes: number, atEnd?: CowcatcherError): Promise<Buffer> {
    if (lengthBytes === 0) return Buffer.alloc(0);
    for (;;) {
      const bytes = this.socket.read(lengthBytes) as Buffer | null;
      if (bytes !== null && bytes.length === lengthBytes) return bytes;
      // A stream that ended gives the rest, however short.
      if (bytes !== null || this.#isEnded || this.socket.destroyed) {
        if (bytes === null && atEnd !== undefined) throw atEnd;
        throw new CowcatcherError({
          code: "IO",
          object: this.object,
          problem: "the connection ended during the negotiation",
          errno: "ECONNRESET",
          cause: this.#failure,
        });
      }
      await new Promise<void>((resolve) => {
        this.#wake = resolve;
      });
    }
  }

  detach(): void {
    this.socket.removeListener("readable", this.#onReadable);
    this.socket.removeListener("end", this.#onEnd);
    this.socket.removeListener("error", this.#onError);
    this.socket.removeListener("close", this.#onEnd);
  }
}
