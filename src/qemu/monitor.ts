// A QEMU's monitor, visited for moments. A QMP socket serves one client at a time, and whoever manages the guest needs
// it, too: so each piece of work connects, runs its commands, and leaves. Between visits nothing is held.
//
// Visits of one process follow each other; those of other programs come between. A visit that finds the socket taken waits for
// it, for GREETING_MS at most. Main thread.

import { setTimeout as delay } from "node:timers/promises";
import { CowcatcherError } from "../errors.js";
import { ControlClient, type ControlEvent } from "../qmp/client.js";
import { isJsonObject, type JsonObject } from "../qmp/protocol.js";

/** Of another program's visit that is under way. */
const GREETING_MS = 30_000;
const HINT = "is QEMU running there, and does no other program hold its monitor?";
const POLL_MS = 20;

export class QemuMonitor {
  readonly path: string;
  #last: Promise<unknown> = Promise.resolve();

  constructor(path: string) {
    this.path = path;
  }

  /**
   * Connects, does the work and leaves, whatever comes of it.
   * @throws CowcatcherError NOT_FOUND, IO (also ETIMEDOUT: somebody else has the monitor), PROTOCOL; what `work` throws
   */
  visit<T>(work: (visit: Visit) => Promise<T>): Promise<T> {
    const result = this.#last.then(() => this.#visit(work));
    this.#last = result.catch(() => undefined);
    return result;
  }

  async #visit<T>(work: (visit: Visit) => Promise<T>): Promise<T> {
    const client = await ControlClient.connect(this.path, { timeoutMs: GREETING_MS, hint: HINT });
    const visit = new Visit(client);
    try {
      return await work(visit);
    } finally {
      visit.end();
    }
  }
}

/** One connection. Events are kept from its start on, so that none is missed between a command and the wait for it. */
export class Visit {
  readonly #client: ControlClient;
  readonly #events: ControlEvent[] = [];

  constructor(client: ControlClient) {
    this.#client = client;
    client.onEvent((event) => this.#events.push(event));
  }

  get path(): string {
    return this.#client.path;
  }

  /** @throws QmpError for QEMU's own refusal; CowcatcherError IO for a lost connection or no answer in time. */
  execute(command: string, args: JsonObject = {}, timeoutMs?: number): Promise<unknown> {
    return this.#client.execute(command, args, timeoutMs === undefined ? {} : { timeoutMs });
  }

  /** The answer as a list of objects; anything else in it is left out. */
  async list(command: string, args: JsonObject = {}): Promise<JsonObject[]> {
    const answer = await this.execute(command, args);
    return Array.isArray(answer) ? answer.filter(isJsonObject) : [];
  }

  /** Whether such an event came during this visit. */
  saw(event: string, matches: (data: JsonObject) => boolean): boolean {
    return this.#events.some((seen) => seen.event === event && matches(seen.data));
  }

  /** Asks until the answer is yes. @throws CowcatcherError IO (ETIMEDOUT) naming `what`. */
  async until(what: string, isSo: () => Promise<boolean>, limitMs: number): Promise<void> {
    const endMs = performance.now() + limitMs;
    while (!(await isSo())) {
      if (performance.now() > endMs) {
        throw new CowcatcherError({
          code: "IO",
          object: this.path,
          problem: `${what}: not within ${limitMs / 1000} s`,
          errno: "ETIMEDOUT",
        });
      }
      await delay(POLL_MS);
    }
  }

  end(): void {
    this.#client.close();
  }
}
