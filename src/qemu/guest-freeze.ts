// The guest's file systems are frozen for T0 by its agent, and thawed whatever happens. Main thread.
//
//   check (before anything is prepared: is there an agent, and are they thawed?)
//   freeze ─► frozen ─► thaw ─► thawed
//        └─ failed, given up, no answer ─► thaw ─► …
//
// Thaw goes out even where the freeze failed or was not answered: the agent may be at it yet, and freezes then
// for nobody. It is tried again over new connections, and as a last resort sent without waiting when the process
// ends. Only `kill -9` leaves a guest frozen: `--cleanup --freeze SOCK` thaws it.
//
// An agent that says that it is frozen already is somebody else's: it is neither frozen nor thawed by us.
//
// Windows holds a freeze for ten seconds at most (VSS), and an administrator may thaw at any time. The agent says how
// many file systems it thawed; fewer than were frozen means that T0 may have met a guest that wrote again.

import type { FreezeInfo, GuestFreezer } from "../backup/job/while-frozen.js";
import { CowcatcherError, toCowcatcherError } from "../errors.js";
import { GuestAgent, SYNC_MS } from "./guest-agent.js";

const STATUS_MS = 10_000;
/** Everything that the guest has not written yet is written first. */
const FREEZE_MS = 60_000;
const THAW_MS = 30_000;
const THAW_TRIES = 3;

/** Of check, freeze and thaw with all of its tries together. */
export const FREEZE_MS_MAX =
  2 * (SYNC_MS + STATUS_MS) + SYNC_MS + FREEZE_MS + THAW_TRIES * (SYNC_MS + THAW_MS);

export interface FreezeLimits {
  statusMs: number;
  freezeMs: number;
  thawMs: number;
}

const LIMITS: FreezeLimits = { statusMs: STATUS_MS, freezeMs: FREEZE_MS, thawMs: THAW_MS };

export class GuestFreeze implements GuestFreezer {
  readonly path: string;
  readonly #limits: FreezeLimits;
  #agent: GuestAgent | undefined;
  #startMs: number | undefined;
  #frozenCount = 0;
  info: FreezeInfo | undefined;

  /** @param limits of each command; others only in tests */
  constructor(path: string, limits: Partial<FreezeLimits> = {}) {
    this.path = path;
    this.#limits = { ...LIMITS, ...limits };
  }

  async check(): Promise<void> {
    await this.#refuseFrozen();
    this.#leave();
  }

  async freeze(signal?: AbortSignal): Promise<void> {
    const agent = await this.#refuseFrozen();
    signal?.throwIfAborted();
    this.#startMs = performance.now();
    process.on("exit", this.#atExit);
    const answer = await orAborted(agent.execute("guest-fsfreeze-freeze", this.#limits.freezeMs), signal);
    this.#frozenCount = typeof answer === "number" ? answer : 0;
  }

  async thaw(): Promise<void> {
    const startMs = this.#startMs;
    if (startMs === undefined) return;
    let failure: unknown;
    for (let i = 0; i < THAW_TRIES; i++) {
      try {
        const thawedCount = await this.#thawOnce();
        this.info = {
          frozenMs: performance.now() - startMs,
          fileSystemCount: this.#frozenCount,
          isHeld: thawedCount >= this.#frozenCount,
        };
        this.#startMs = undefined;
        process.removeListener("exit", this.#atExit);
        return;
      } catch (error) {
        failure ??= error;
      } finally {
        this.#leave();
      }
    }
    throw stillFrozen(this.path, failure);
  }

  async #thawOnce(): Promise<number> {
    this.#agent ??= await GuestAgent.connect(this.path);
    const answer = await this.#agent.push("guest-fsfreeze-thaw", this.#limits.thawMs);
    return typeof answer === "number" ? answer : 0;
  }

  async #refuseFrozen(): Promise<GuestAgent> {
    this.#agent = await GuestAgent.connect(this.path);
    try {
      const status = await this.#agent.execute("guest-fsfreeze-status", this.#limits.statusMs);
      if (status === "thawed") return this.#agent;
      throw new CowcatcherError({
        code: "BUSY",
        object: this.path,
        problem: `the guest's file systems are ${String(status)} already`,
        hint: `wait for the other backup, or, if there is none: cowcatcher backup --cleanup --freeze ${this.path}`,
      });
    } catch (error) {
      this.#leave();
      throw error;
    }
  }

  #leave(): void {
    this.#agent?.close();
    this.#agent = undefined;
  }

  readonly #atExit = (): void => this.#agent?.pushNow("guest-fsfreeze-thaw");
}

/** Thaws what a run that was killed has left frozen; how many file systems that were. @throws CowcatcherError */
export async function thawGuest(path: string, { thawMs } = LIMITS): Promise<number> {
  const agent = await GuestAgent.connect(path);
  try {
    const answer = await agent.push("guest-fsfreeze-thaw", thawMs);
    return typeof answer === "number" ? answer : 0;
  } finally {
    agent.close();
  }
}

/** What comes first; the work goes on by itself when the signal does. @throws the signal's reason */
export async function orAborted<T>(work: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (signal === undefined) return work;
  work.catch(() => undefined);
  let giveUp: () => void = () => undefined;
  const aborted = new Promise<never>((_resolve, reject) => {
    giveUp = () => reject(toCowcatcherError(signal.reason));
  });
  aborted.catch(() => undefined);
  signal.addEventListener("abort", giveUp);
  try {
    return await Promise.race([work, aborted]);
  } finally {
    signal.removeEventListener("abort", giveUp);
  }
}

function stillFrozen(object: string, cause: unknown): CowcatcherError {
  const { problem } = toCowcatcherError(cause, object);
  return new CowcatcherError({
    code: "IO",
    object,
    problem: `the guest may still be frozen, as it could not be thawed: ${problem}`,
    hint: `run: cowcatcher backup --cleanup --freeze ${object}`,
    cause,
  });
}
