// The command line's side of the control socket: one connection, requests by id, events to listeners.
//
// Everything ends: connecting and each command have a time limit, and a lost connection rejects what is under way
// and everything after it with the same error. Main thread only.

import { connect as connectSocket } from "node:net";
import type { Socket } from "node:net";
import { CowcatcherError, errnoOf, ioError } from "../errors.js";
import { JsonStream } from "./json-stream.js";
import { ANSWER_LIMITS, errorFromAnswer, isJsonObject } from "./protocol.js";
import type { JsonObject } from "./protocol.js";

const CONNECT_MS = 10_000;
/** Long enough for what a busy server does besides. */
export const COMMAND_MS = 120_000;

const SERVE_HINT = "is `cowcatcher serve --control` running there?";

export interface ControlEvent {
  event: string;
  data: JsonObject;
  timestampMs: number;
}

/** An NBD server begins with it, and then waits for its client. */
const NBD_MAGIC = Buffer.from("NBDMAGIC");

export type EventListener = (event: ControlEvent) => void;

interface PendingCommand {
  resolve: (value: unknown) => void;
  reject: (error: CowcatcherError) => void;
  timer: NodeJS.Timeout;
}

/**
 * A client of a QMP socket: one command at a time, events as they come. Main thread only; every wait has a
 * limit; rejects with QmpError, IO or PROTOCOL.
 */
export class ControlClient {
  readonly path: string;
  readonly #hint: string;
  readonly #socket: Socket;
  readonly #input = new JsonStream(ANSWER_LIMITS);
  readonly #pending = new Map<number, PendingCommand>();
  readonly #listeners = new Set<EventListener>();
  readonly #lossListeners = new Set<(error: CowcatcherError) => void>();
  /** What the server has said so far, until it is as long as the magic of another protocol. */
  #first: Buffer | undefined = Buffer.alloc(0);
  #nextId = 1;
  #greet: (() => void) | undefined;
  #lost: CowcatcherError | undefined;

  private constructor(path: string, socket: Socket, hint: string) {
    this.path = path;
    this.#hint = hint;
    this.#socket = socket;
    socket.on("data", (chunk) => this.#receive(chunk));
    socket.on("error", (cause) => this.#lose(ioError("talk to the server", path, cause)));
    socket.on("close", () => this.#lose(lostError(path)));
  }

  /**
   * Connects and negotiates. `hint` says what a user can do where no server answers.
   * @throws CowcatcherError NOT_FOUND or IO if nothing listens at `path`, PROTOCOL if it is no QMP server.
   */
  static async connect(
    path: string,
    { timeoutMs = CONNECT_MS, hint = SERVE_HINT } = {},
  ): Promise<ControlClient> {
    const socket = await openSocket(path, timeoutMs, hint);
    const client = new ControlClient(path, socket, hint);
    try {
      await client.#greeting(timeoutMs);
      await client.execute("qmp_capabilities", {}, { timeoutMs });
    } catch (error) {
      client.close();
      throw error;
    }
    return client;
  }

  /**
   * Runs a command and returns the answer's `return`. Members of `args` that are undefined are not sent.
   * @throws QmpError (a CowcatcherError with `errorClass` and `desc`) for an error answer; CowcatcherError IO for
   *   a lost connection or no answer in time.
   */
  execute(command: string, args: JsonObject = {}, { timeoutMs = COMMAND_MS } = {}): Promise<unknown> {
    if (this.#lost !== undefined) return Promise.reject(this.#lost);
    const id = this.#nextId++;
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => {
        this.#pending.delete(id);
        reject(silentError(this.path, `no answer to ${command}`, timeoutMs, this.#hint));
      }, timeoutMs);
      this.#pending.set(id, { resolve, reject, timer });
      this.#socket.write(`${JSON.stringify({ execute: command, arguments: args, id })}\n`);
    });
  }

  /** Calls `listener` for each event from now on. Returns the function that ends it. */
  onEvent(listener: EventListener): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  /** Calls `listener` once when the connection ends, also by `close`. Returns the function that ends it. */
  onLoss(listener: (error: CowcatcherError) => void): () => void {
    if (this.#lost !== undefined) queueMicrotask(() => listener(this.#lost ?? lostError(this.path)));
    else this.#lossListeners.add(listener);
    return () => this.#lossListeners.delete(listener);
  }

  close(): void {
    this.#lose(
      new CowcatcherError({
        code: "CANCELLED",
        object: this.path,
        problem: "the control connection is closed",
      }),
    );
  }

  #greeting(timeoutMs: number): Promise<void> {
    return new Promise((resolve, reject) => {
      const timer = setTimeout(
        () => reject(silentError(this.path, "no QMP greeting", timeoutMs, this.#hint)),
        timeoutMs,
      );
      const forgetLoss = this.onLoss((error) => {
        clearTimeout(timer);
        reject(error);
      });
      this.#greet = () => {
        clearTimeout(timer);
        forgetLoss();
        resolve();
      };
    });
  }

  #receive(chunk: Buffer): void {
    this.#first = this.#first && Buffer.concat([this.#first, chunk]).subarray(0, NBD_MAGIC.length);
    if (this.#first?.length === NBD_MAGIC.length) {
      if (this.#first.equals(NBD_MAGIC)) {
        this.#lose(this.#protocolError("is an NBD socket, not a control socket"));
        return;
      }
      this.#first = undefined;
    }
    for (const item of this.#input.push(chunk)) {
      if (this.#lost !== undefined) return;
      if ("value" in item && isJsonObject(item.value)) this.#take(item.value);
      else this.#lose(this.#protocolError("error" in item ? item.error : "a message is not an object"));
    }
  }

  #take(message: JsonObject): void {
    if ("QMP" in message) {
      this.#greet?.();
    } else if (typeof message.event === "string") {
      const event = readEvent(message.event, message);
      for (const listener of this.#listeners) listener(event);
    } else {
      this.#settle(message);
    }
  }

  #settle(message: JsonObject): void {
    const { id, error, return: result } = message;
    const pending = typeof id === "number" ? this.#pending.get(id) : undefined;
    if (pending === undefined) {
      // An answer that came after its time limit is dropped; an error without id is about the connection.
      if (id === undefined && error !== undefined) this.#lose(errorFromAnswer(error, this.path));
      return;
    }
    this.#pending.delete(id as number);
    clearTimeout(pending.timer);
    if (error !== undefined) pending.reject(errorFromAnswer(error, this.path));
    else pending.resolve(result);
  }

  #protocolError(problem: string): CowcatcherError {
    return new CowcatcherError({ code: "PROTOCOL", object: this.path, problem, hint: this.#hint });
  }

  #lose(error: CowcatcherError): void {
    if (this.#lost !== undefined) return;
    this.#lost = error;
    this.#socket.destroy();
    for (const { reject, timer } of this.#pending.values()) {
      clearTimeout(timer);
      reject(error);
    }
    this.#pending.clear();
    for (const listener of [...this.#lossListeners]) listener(error);
    this.#lossListeners.clear();
    this.#listeners.clear();
  }
}

function readEvent(event: string, { data, timestamp }: JsonObject): ControlEvent {
  const { seconds, microseconds } = isJsonObject(timestamp) ? timestamp : {};
  const timestampMs =
    typeof seconds === "number" && typeof microseconds === "number"
      ? seconds * 1000 + microseconds / 1000
      : 0;
  return { event, data: isJsonObject(data) ? data : {}, timestampMs };
}

function openSocket(path: string, timeoutMs: number, hint: string): Promise<Socket> {
  return new Promise((resolve, reject) => {
    const socket = connectSocket(path);
    const timer = setTimeout(() => {
      socket.destroy();
      reject(silentError(path, "cannot connect", timeoutMs, hint));
    }, timeoutMs);
    socket.once("error", (cause) => {
      clearTimeout(timer);
      reject(connectError(path, cause, hint));
    });
    socket.once("connect", () => {
      clearTimeout(timer);
      socket.removeAllListeners("error");
      resolve(socket);
    });
  });
}

function connectError(path: string, cause: Error, serverHint: string): CowcatcherError {
  const { code, problem, errno } = ioError("connect", path, cause);
  const nobodyThere = errnoOf(cause) === "ENOENT" || errnoOf(cause) === "ECONNREFUSED";
  const hint = nobodyThere ? serverHint : undefined;
  return new CowcatcherError({ code, object: path, problem, errno, hint, cause });
}

function lostError(path: string): CowcatcherError {
  return new CowcatcherError({
    code: "IO",
    object: path,
    problem: "the control connection was lost",
    hint: "did the server end? its log says why",
  });
}

function silentError(path: string, what: string, timeoutMs: number, hint: string): CowcatcherError {
  return new CowcatcherError({
    code: "IO",
    object: path,
    problem: `${what} within ${timeoutMs / 1000} s`,
    hint,
    errno: "ETIMEDOUT",
  });
}
