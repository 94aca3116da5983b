// A store in memory, and one user's view of it, who may die at any of his calls: before the call has an effect, or after
// it and before the answer. The dead never hear again. It may also be full.
import { CowcatcherError } from "../../../src/errors.js";
import {
  checkObjectName,
  type ListedObject,
  notFoundError,
  type ObjectInfo,
  type PutOutcome,
  type Store,
} from "../../../src/repository/store/store.js";

export type Objects = Map<string, { content: Buffer; changedMs: number }>;

export interface Fate {
  /** The call, counted from 1, at which the user dies; undefined: he lives. */
  diesAtCall?: number | undefined;
  /** Whether what he asked for last still happens. */
  lastCallHappens?: boolean;
  /** Bytes that the store holds at most. */
  capacityBytes?: number;
}

export class MortalStore implements Store {
  readonly name = "memory";
  calls = 0;
  isDead = false;
  /** Called when the user dies. */
  onDeath: () => void = () => {};

  constructor(
    readonly objects: Objects,
    readonly fate: Fate = {},
  ) {}

  async #call<T>(act: () => T): Promise<T> {
    // A turn, as of any store: several calls are under way at a time.
    await new Promise(setImmediate);
    const number = ++this.calls;
    const { diesAtCall = Infinity, lastCallHappens = false } = this.fate;
    if (number === diesAtCall) {
      if (lastCallHappens) act();
      this.isDead = true;
      this.onDeath();
    }
    if (this.isDead) return new Promise<T>(() => {});
    return act();
  }

  #set(name: string, content: Uint8Array): void {
    checkObjectName(name);
    const { capacityBytes = Infinity } = this.fate;
    let used = content.length;
    for (const [other, { content: stored }] of this.objects) if (other !== name) used += stored.length;
    if (used > capacityBytes) {
      throw new CowcatcherError({ code: "NO_SPACE", object: this.name, problem: "no space is left" });
    }
    this.objects.set(name, { content: Buffer.from(content), changedMs: Date.now() });
  }

  put(name: string, content: Uint8Array): Promise<PutOutcome> {
    return this.#call(() => {
      if (this.objects.has(name)) return "present";
      this.#set(name, content);
      return "stored";
    });
  }

  get(name: string): Promise<Buffer> {
    return this.#call(() => {
      const found = this.objects.get(name);
      if (found === undefined) throw notFoundError(this.name, name);
      return Buffer.from(found.content);
    });
  }

  head(name: string): Promise<ObjectInfo | undefined> {
    return this.#call(() => {
      const found = this.objects.get(name);
      return found && { sizeBytes: found.content.length, changedMs: found.changedMs };
    });
  }

  async *list(prefix: string): AsyncGenerator<ListedObject[]> {
    const names = await this.#call(() => [...this.objects.keys()].filter((name) => name.startsWith(prefix)));
    yield names.map((name) => ({ name, sizeBytes: this.objects.get(name)?.content.length ?? 0 }));
  }

  delete(name: string): Promise<void> {
    return this.#call(() => void this.objects.delete(name));
  }

  touch(name: string, content: Uint8Array): Promise<void> {
    return this.#call(() => this.#set(name, content));
  }

  flush(): Promise<void> {
    return this.#call(() => undefined);
  }

  removeLitter(): Promise<number> {
    return this.#call(() => 0);
  }

  close(): void {
    // Nothing is open.
  }
}
