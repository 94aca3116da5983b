// One connection to QEMU's guest agent (qemu-ga) in the guest, through the socket of its virtio-serial port. Main thread.
//
// The channel has no greeting, no ids, and no end: what an earlier client left unread comes to the next one, and a half
// request of its stands before the next one's. So each request is preceded by guest-sync-delimited: a byte 0xFF, at
// which the agent forgets a half request, and a number that it gives back; whatever comes before that number is not ours
// (qga/qapi-schema.json). The agent does one thing after another, and a request that was given up is still done.
//
// Hence two ways to ask. `execute` sends the command when the agent has answered the number: an agent that hangs
// does not find a freeze in its queue when it wakes up, with nobody there to thaw. `push` sends both at once: for thaw.

import { randomInt } from "node:crypto";
import { connect as connectSocket, type Socket } from "node:net";
import { CowcatcherError, errnoOf, ioError } from "../errors.js";
import { JsonStream } from "../qmp/json-stream.js";
import { ANSWER_LIMITS, isJsonObject, type JsonObject } from "../qmp/protocol.js";

const SENTINEL = Buffer.from([0xff]);
/** Of an agent that is there and does nothing else. */
export const SYNC_MS = 10_000;
const NUMBER_MAX = 2 ** 47;
const HINT = "does the agent run in the guest, and has no other program its socket?";

export class GuestAgent {
  readonly path: string;
  readonly #socket: Socket;
  readonly #input = new JsonStream(ANSWER_LIMITS);
  #answers: JsonObject[] = [];
  #wake: (() => void) | undefined;
  #lost: CowcatcherError | undefined;

  private constructor(path: string, socket: Socket) {
    this.path = path;
    this.#socket = socket;
    socket.on("data", (chunk) => this.#receive(chunk));
    socket.on("error", (cause) => this.#lose(ioError("talk to the guest agent", path, cause)));
    socket.on("close", () => this.#lose(agentError(path, "the connection to the guest agent was lost")));
  }

  /** @throws CowcatherError NOT_FOUND or IO where nothing listens at `path` */
  static connect(path: string, limitMs = SYNC_MS): Promise<GuestAgent> {
    return new Promise((resolve, reject) => {
      const socket = connectSocket(path);
      const timer = setTimeout(() => {
        socket.destroy();
        reject(silent(path, "a connection", limitMs));
      }, limitMs);
      socket.once("error", (cause) => {
        clearTimeout(timer);
        const { code, problem, errno } = ioError("connect to the guest agent", path, cause);
        const isNobody = errnoOf(cause) === "ENOENT" || errnoOf(cause) === "ECONNREFUSED";
        const hint = isNobody ? "give the socket of QEMU's port org.qemu.guest_agent.0" : undefined;
        reject(new CowcatcherError({ code, object: path, problem, errno, hint, cause }));
      });
      socket.once("connect", () => {
        clearTimeout(timer);
        socket.removeAllListeners("error");
        resolve(new GuestAgent(path, socket));
      });
    });
  }

  /**
   * Asks when the agent is there. The answer's `return`.
   * @throws CowcatcherError IO (ETIMEDOUT; a lost connection), UNSUPPORTED for a refusal of the agent's, in its words
   */
  async execute(command: string, limitMs: number): Promise<unknown> {
    await this.#sync("", SYNC_MS);
    this.#send(line(command));
    return this.#answerTo(command, limitMs);
  }

  /** Asks at once, so that it is done whatever becomes of us. Otherwise as execute. */
  async push(command: string, limitMs: number): Promise<unknown> {
    const startMs = performance.now();
    await this.#sync(line(command), limitMs);
    return this.#answerTo(command, Math.max(1, limitMs - (performance.now() - startMs)));
  }

  /** As push, with no answer awaited, for a process that is about to end: the kernel has it when this returns. */
  pushNow(command: string): void {
    if (this.#lost === undefined) this.#socket.write(Buffer.concat([SENTINEL, Buffer.from(line(command))]));
  }

  async #sync(then: string, limitMs: number): Promise<void> {
    const id = randomInt(1, NUMBER_MAX);
    this.#send(Buffer.concat([SENTINEL, Buffer.from(line("guest-sync-delimited", { id }) + then)]));
    const isOurs = (answer: JsonObject): boolean => answer["return"] === id;
    await this.#until(() => this.#answers.some(isOurs), "an answer", limitMs);
    this.#answers = this.#answers.slice(this.#answers.findIndex(isOurs) + 1);
  }

  async #answerTo(command: string, limitMs: number): Promise<unknown> {
    await this.#until(() => this.#answers.length > 0, `an answer to ${command}`, limitMs);
    const { error, return: result } = this.#answers.shift() ?? {};
    if (error === undefined) return result;
    const desc = isJsonObject(error) && typeof error["desc"] === "string" ? error["desc"] : "no reason given";
    throw new CowcatcherError({
      code: "UNSUPPORTED",
      object: this.path,
      problem: `the guest agent refuses ${command}: ${desc}`,
    });
  }

  #send(data: string | Buffer): void {
    if (this.#lost !== undefined) throw this.#lost;
    this.#socket.write(data);
  }

  /** One waits at a time. */
  async #until(isSo: () => boolean, what: string, limitMs: number): Promise<void> {
    const endMs = performance.now() + limitMs;
    while (!isSo()) {
      if (this.#lost !== undefined) throw this.#lost;
      const leftMs = endMs - performance.now();
      if (leftMs <= 0) throw silent(this.path, what, limitMs);
      await new Promise<void>((resolve) => {
        const timer = setTimeout(resolve, leftMs);
        this.#wake = () => {
          clearTimeout(timer);
          resolve();
        };
      });
    }
  }

  /** Bytes that are no JSON are an earlier client's, or the sentinel: what matters comes after the number. */
  #receive(chunk: Buffer): void {
    for (const item of this.#input.push(chunk)) {
      if ("value" in item && isJsonObject(item.value)) this.#answers.push(item.value);
    }
    this.#wake?.();
  }

  #lose(error: CowcatcherError): void {
    this.#lost ??= error;
    this.#socket.destroy();
    this.#wake?.();
  }

  close(): void {
    this.#lose(agentError(this.path, "the connection to the guest agent is closed"));
  }
}

function line(command: string, args?: JsonObject): string {
  return `${JSON.stringify({ execute: command, arguments: args })}\n`;
}

function agentError(object: string, problem: string): CowcatcherError {
  return new CowcatcherError({ code: "IO", object, problem, hint: HINT });
}

function silent(object: string, what: string, limitMs: number): CowcatcherError {
  return new CowcatcherError({
    code: "IO",
    object,
    problem: `the guest agent gave not ${what} within ${limitMs / 1000} s`,
    hint: HINT,
    errno: "ETIMEDOUT",
  });
}
