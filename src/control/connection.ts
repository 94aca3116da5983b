// One client of the control socket: greeting, negotiation, requests one after another, events in between.
//
// Requests are answered in the order in which they came. While one is under way the socket is not read, so the
// queue holds no more than what one read brought; and while the client leaves answers unread, nothing new is read
// from it either. Events cannot wait for it: when they pile up beyond OUTPUT_BYTES_MAX the client is dropped.

import type { Socket } from "node:net";
import type { Logger } from "../log.js";
import { toCowcatcherError } from "../errors.js";
import { NEGOTIATE } from "./commands.js";
import { JsonStream } from "../qmp/json-stream.js";
import type { JsonItem } from "../qmp/json-stream.js";
import { QmpError, REQUEST_LIMITS, errorAnswer, genericError, isJsonObject } from "../qmp/protocol.js";
import type { JsonObject } from "../qmp/protocol.js";
import { checkMembers, list, optional, string } from "../qmp/schema.js";

/** Unsent bytes at which a client that does not read is given up, besides what the system's own buffer holds. */
export const OUTPUT_BYTES_MAX = 1024 * 1024;
/** How long `end` waits for the client to take its last answers. */
const CLOSE_GRACE_MS = 1000;

const CAPABILITIES = { enable: optional(list(string)) };

export type ExecuteCommand = (name: string, args: JsonObject) => unknown;

export interface ConnectionSettings {
  greeting: JsonObject;
  execute: ExecuteCommand;
  logger: Pick<Logger, "debug" | "warn">;
}

interface Request {
  name: string;
  args: JsonObject;
}

export class ControlConnection {
  readonly #socket: Socket;
  readonly #execute: ExecuteCommand;
  readonly #logger: Pick<Logger, "debug" | "warn">;
  readonly #input = new JsonStream(REQUEST_LIMITS);
  readonly #queue: JsonItem[] = [];
  #working = false;
  #negotiated = false;

  constructor(socket: Socket, { greeting, execute, logger }: ConnectionSettings) {
    this.#socket = socket;
    this.#execute = execute;
    this.#logger = logger;
    socket.on("data", (chunk) => this.#receive(chunk));
    socket.on("error", (error) => logger.debug({ error }, "a control connection failed"));
    this.#send(greeting);
  }

  /** It has said more than nothing. */
  get isNegotiated(): boolean {
    return this.#negotiated;
  }

  /** @param line an event, ended by CR LF; a client that has not negotiated does not get it. */
  sendEvent(line: string): void {
    if (this.#negotiated) this.#write(line);
  }

  /** Sends what is queued, then closes. */
  end(): void {
    this.#socket.end();
    const timer = setTimeout(() => this.#socket.destroy(), CLOSE_GRACE_MS);
    this.#socket.once("close", () => clearTimeout(timer));
  }

  #receive(chunk: Buffer): void {
    this.#queue.push(...this.#input.push(chunk));
    if (!this.#working && this.#queue.length > 0) void this.#work();
  }

  async #work(): Promise<void> {
    this.#working = true;
    this.#socket.pause();
    for (let item = this.#queue.shift(); item !== undefined; item = this.#queue.shift()) {
      this.#send(await this.#answer(item));
      if (this.#socket.writableNeedDrain) await this.#untilDrained();
    }
    this.#working = false;
    this.#socket.resume();
  }

  #untilDrained(): Promise<void> {
    const socket = this.#socket;
    if (socket.destroyed) return Promise.resolve();
    return new Promise((resolve) => {
      const settle = () => {
        socket.off("drain", settle);
        socket.off("close", settle);
        resolve();
      };
      socket.on("drain", settle);
      socket.on("close", settle);
    });
  }

  /** Never rejects: whatever goes wrong is an answer. */
  async #answer(item: JsonItem): Promise<JsonObject> {
    const id = "value" in item && isJsonObject(item.value) && "id" in item.value ? { id: item.value.id } : {};
    try {
      if ("error" in item) throw genericError(item.error);
      const { name, args } = checkRequest(item.value);
      const result =
        name === NEGOTIATE || !this.#negotiated ? this.#negotiate(name, args) : this.#execute(name, args);
      return { return: await result, ...id };
    } catch (thrown) {
      const error = toCowcatcherError(thrown, "control socket");
      const level = error.code === "INTERNAL" ? "warn" : "debug";
      this.#logger[level]({ error }, "a control command failed");
      return { error: errorAnswer(error), ...id };
    }
  }

  #negotiate(name: string, args: JsonObject): JsonObject {
    if (name !== NEGOTIATE) {
      throw new QmpError("CommandNotFound", `Expecting capabilities negotiation with '${NEGOTIATE}'`);
    }
    if (this.#negotiated) {
      throw new QmpError("CommandNotFound", "Capabilities negotiation is already complete, command ignored");
    }
    const [capability] = checkMembers(args, CAPABILITIES).enable ?? [];
    if (capability !== undefined) throw genericError(`Capability '${capability}' is not available`);
    this.#negotiated = true;
    return {};
  }

  #send(message: JsonObject): void {
    this.#write(`${JSON.stringify(message)}\r\n`);
  }

  #write(line: string): void {
    if (!this.#socket.writable) return;
    if (this.#socket.writableLength > OUTPUT_BYTES_MAX) {
      this.#logger.warn(
        { bytes: this.#socket.writableLength },
        "dropped a control client that does not read",
      );
      this.#socket.destroy();
      return;
    }
    this.#socket.write(line);
  }
}

/** The checks of QEMU's qmp_dispatch_check_obj, in its words. */
function checkRequest(value: unknown): Request {
  if (!isJsonObject(value)) throw genericError("QMP input must be a JSON object");
  for (const [member, content] of Object.entries(value)) {
    if (member === "execute") {
      if (typeof content !== "string") throw genericError("QMP input member 'execute' must be a string");
    } else if (member === "arguments") {
      if (!isJsonObject(content)) throw genericError("QMP input member 'arguments' must be an object");
    } else if (member !== "id") {
      throw genericError(`QMP input member '${member}' is unexpected`);
    }
  }
  const { execute: name, arguments: args = {} } = value;
  if (typeof name !== "string") throw genericError("QMP input lacks member 'execute'");
  return { name, args: isJsonObject(args) ? args : {} };
}
