// A client that sends bytes as they are and collects what comes back, for tests of the wire itself.
import { once } from "node:events";
import { connect } from "node:net";
import type { Socket } from "node:net";
import { errnoOf } from "../../src/errors.js";

export interface QmpMessage {
  QMP?: { version: { qemu: Record<string, number>; package: string }; capabilities: unknown[] };
  event?: string;
  data?: Record<string, unknown>;
  timestamp?: { seconds: number; microseconds: number };
  return?: unknown;
  error?: { class: string; desc: string };
  id?: unknown;
}

export class RawQmp {
  readonly socket: Socket;
  readonly messages: QmpMessage[] = [];
  #text = "";
  #readCount = 0;
  #wake: () => void = () => undefined;

  private constructor(socket: Socket) {
    this.socket = socket;
    socket.setEncoding("utf8");
    socket.on("error", () => undefined);
    socket.on("data", (text: string) => this.#take(text));
  }

  /** Tries again while the connection is refused: a server binds its socket a moment before it listens on it. */
  static async connect(path: string): Promise<RawQmp> {
    const deadline = Date.now() + 60_000;
    for (;;) {
      const socket = connect(path);
      const client = new RawQmp(socket);
      try {
        await once(socket, "connect");
        return client;
      } catch (error) {
        if (errnoOf(error) !== "ECONNREFUSED" || Date.now() > deadline) throw error;
        await new Promise((resolve) => setTimeout(resolve, 5));
      }
    }
  }

  /** Connected, greeted and negotiated. */
  static async negotiated(path: string): Promise<RawQmp> {
    const client = await RawQmp.connect(path);
    await client.next();
    await client.ask({ execute: "qmp_capabilities" });
    return client;
  }

  send(bytes: string | Uint8Array): void {
    this.socket.write(bytes);
  }

  /** The next message, whatever it is. Vitest's own time limit bounds the wait. */
  async next(): Promise<QmpMessage> {
    while (this.#readCount >= this.messages.length) {
      await new Promise<void>((resolve) => (this.#wake = resolve));
    }
    return this.messages[this.#readCount++];
  }

  async nextAnswer(): Promise<QmpMessage> {
    for (;;) {
      const message = await this.next();
      if (message.event === undefined) return message;
    }
  }

  ask(request: unknown): Promise<QmpMessage> {
    this.send(JSON.stringify(request));
    return this.nextAnswer();
  }

  /** Events so far as "NAME status", in order. */
  events(): string[] {
    return this.messages
      .filter(({ event }) => event !== undefined)
      .map(({ event = "", data }) => (typeof data?.status === "string" ? data.status : event));
  }

  close(): void {
    this.socket.destroy();
  }

  #take(text: string): void {
    this.#text += text;
    const lines = this.#text.split("\r\n");
    this.#text = lines.pop() ?? "";
    for (const line of lines) this.messages.push(JSON.parse(line) as QmpMessage);
    this.#wake();
  }
}
