// A store in memory whose every call is one step of a seeded scheduler, and the scheduler: one step runs at a time, and
// which one is a matter of the seed. A listing sees its names in two moments, and shows of what came or went between
// them whatever the seed says, as store.ts allows.
import {
  type GetOptions,
  checkObjectName,
  type ListedObject,
  notFoundError,
  type ObjectInfo,
  type PutOutcome,
  type Store,
} from "../../../src/repository/store/store.js";
import type { Random } from "../random.js";

/** Of listings that find nothing, those that take their time all the same. */
const EMPTY_LISTING_STEPS = 0.02;

const PACES = [1, 0.3, 0.03] as const;
/** Of all steps, those after which everybody goes at another pace. */
const PACES_CHANGE = 0.01;

interface Waiting {
  actor: string;
  resume: () => void;
}

export class Scheduler {
  readonly #random: Random;
  readonly #waiting: Waiting[] = [];
  readonly #killed = new Set<string>();
  /** By actor, how likely it is to have its turn when it could; drawn anew from time to time. */
  readonly #paces = new Map<string, number>();
  steps = 0;

  constructor(random: Random) {
    this.#random = random;
  }

  /** Waits for the actor's turn. One that was killed never has one again. */
  turn(actor: string): Promise<void> {
    return new Promise((resume) => this.#waiting.push({ actor, resume }));
  }

  kill(actor: string): void {
    this.#killed.add(actor);
  }

  isKilled(actor: string): boolean {
    return this.#killed.has(actor);
  }

  /** Runs until nobody waits. @param onStep after each */
  async run(onStep: () => void, maxSteps: number): Promise<void> {
    for (;;) {
      await new Promise(setImmediate);
      const ready = this.#waiting.filter(({ actor }) => !this.#killed.has(actor));
      if (ready.length === 0) return;
      if (++this.steps > maxSteps) throw new Error(`no end after ${maxSteps} steps`);
      const next = this.#random.pick(this.#quickOf(ready));
      this.#waiting.splice(this.#waiting.indexOf(next), 1);
      next.resume();
      await new Promise(setImmediate);
      onStep();
    }
  }

  /** At one pace all would be as far along at any time: no backup would still be at its chunks when a prune deletes some. */
  #quickOf(ready: Waiting[]): Waiting[] {
    if (this.#random.chance(PACES_CHANGE)) this.#paces.clear();
    const quick = ready.filter(({ actor }) => {
      const known = this.#paces.get(actor);
      const pace = known ?? this.#random.pick(PACES);
      if (known === undefined) this.#paces.set(actor, pace);
      return this.#random.chance(pace);
    });
    return quick.length > 0 ? quick : ready;
  }
}

export interface SimulatedObject {
  content: Buffer;
  changedMs: number;
}

/** One actor's view of objects that all share. */
export class SimulatedStore implements Store {
  readonly name = "simulated";

  constructor(
    readonly objects: Map<string, SimulatedObject>,
    readonly scheduler: Scheduler,
    readonly actor: string,
    readonly random: Random,
  ) {}

  async #step<T>(act: () => T): Promise<T> {
    await this.scheduler.turn(this.actor);
    const result = act();
    // The answer takes its time, too.
    await this.scheduler.turn(this.actor);
    return result;
  }

  put(name: string, content: Uint8Array): Promise<PutOutcome> {
    checkObjectName(name);
    const copy = Buffer.from(content);
    return this.#step(() => {
      if (this.objects.has(name)) return "present";
      this.objects.set(name, { content: copy, changedMs: this.scheduler.steps });
      return "stored";
    });
  }

  get(name: string, _maxBytes: number, { range }: GetOptions = {}): Promise<Buffer> {
    return this.#step(() => {
      const found = this.objects.get(name);
      if (found === undefined) throw notFoundError(this.name, name);
      const start = range?.offsetBytes ?? 0;
      return Buffer.from(found.content.subarray(start, start + (range?.lengthBytes ?? Infinity)));
    });
  }

  head(name: string): Promise<ObjectInfo | undefined> {
    return this.#step(() => {
      const found = this.objects.get(name);
      return found && { sizeBytes: found.content.length, changedMs: found.changedMs };
    });
  }

  async *list(prefix: string): AsyncGenerator<ListedObject[]> {
    const names = (): string[] => [...this.objects.keys()].filter((name) => name.startsWith(prefix));
    // Prune asks for each of 256 folders of chunks. Were each a step, whoever works beside it would be done long before.
    if (names().length === 0 && !this.random.chance(EMPTY_LISTING_STEPS)) return;
    const before = await this.#step(names);
    const after = await this.#step(names);
    const shown = [...new Set([...before, ...after])].filter(
      (name) => (before.includes(name) && after.includes(name)) || this.random.chance(0.5),
    );
    yield shown.map((name) => ({ name, sizeBytes: this.objects.get(name)?.content.length ?? 0 }));
  }

  delete(name: string): Promise<void> {
    return this.#step(() => void this.objects.delete(name));
  }

  touch(name: string, content: Uint8Array): Promise<void> {
    const copy = Buffer.from(content);
    return this.#step(() => void this.objects.set(name, { content: copy, changedMs: this.scheduler.steps }));
  }

  flush(): Promise<void> {
    return Promise.resolve();
  }

  removeLitter(): Promise<number> {
    return Promise.resolve(0);
  }

  close(): void {
    // Nothing is open.
  }
}
