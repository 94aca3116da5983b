// The main thread's side of an image's keeper: requests that are awaited no longer than the caller likes.
//
//   take ─► open ─► …requests, one after another… ─► release ─► idle, kept for the next image
//                                                       └─ no answer in RELEASE_GRACE_MS: it goes on by itself
//
// A keeper that hangs is left behind: it answers its requests whenever Ceph answers or the time limits of connect.ts
// end, closes its image and is idle then. Nothing of it is used meanwhile, and the next image gets another.
//
// Why keepers are kept: koffi leaves its record of each thread that loaded a library behind, as copy/threads.ts tells.

import { setTimeout as delay } from "node:timers/promises";
import { Worker } from "node:worker_threads";
import { CowcatcherError, messageOf } from "../errors.js";
import { noteKeeperBusy, noteKeeperIdle } from "./busy.js";
import { Door, PHASE_CANCELLED } from "./door.js";
import { KEEPER_WORKER } from "./keeper-file.js";
import type { KeeperReply, KeeperRequest } from "./keeper-protocol.js";

/** How long a caller waits for an image to be closed, and an unfinished one to be removed. */
const RELEASE_GRACE_MS = 1_000;
/** How often a wait asks whether it is cancelled. */
const CANCEL_POLL_MS = 50;
/** Idle ones; more are ended. */
const KEPT_MAX = 4;
/** A keeper's own data is small; a list of a pool's images and a map of holes are its largest. */
const RESOURCE_LIMITS = { maxOldGenerationSizeMb: 128, maxYoungGenerationSizeMb: 4 };

type Done = Extract<KeeperReply, { kind: "done" }>;

interface Waiting {
  resolve: (reply: KeeperReply) => void;
  reject: (error: CowcatcherError) => void;
}

const idle: KeeperThread[] = [];

/** A thread that lives from image to image. */
class KeeperThread {
  readonly #worker = new Worker(KEEPER_WORKER, { resourceLimits: RESOURCE_LIMITS });
  /** In the order in which they were asked. */
  readonly #waiting: Waiting[] = [];
  #failure: CowcatcherError | undefined;

  constructor() {
    this.#worker.on("message", (reply: KeeperReply) => this.#answered()?.resolve(reply));
    this.#worker.on("error", (error) => this.#failed(messageOf(error)));
    this.#worker.on("exit", (code) => this.#failed(`it ended with code ${code}`));
    // Until it is asked, it holds nobody.
    this.#worker.unref();
  }

  get isFit(): boolean {
    return this.#failure === undefined;
  }

  /** Rejects only if the thread has died. */
  ask(request: KeeperRequest): Promise<KeeperReply> {
    return new Promise((resolve, reject) => {
      if (this.#failure !== undefined) {
        reject(this.#failure);
        return;
      }
      if (this.#waiting.length === 0) {
        noteKeeperBusy();
        this.#worker.ref();
      }
      this.#waiting.push({ resolve, reject });
      this.#worker.postMessage(request);
    });
  }

  #answered(): Waiting | undefined {
    const first = this.#waiting.shift();
    if (first !== undefined && this.#waiting.length === 0) {
      noteKeeperIdle();
      this.#worker.unref();
    }
    return first;
  }

  #failed(why: string): void {
    this.#failure ??= new CowcatcherError({
      code: "WORKER",
      object: "rbd:",
      problem: `the thread that speaks to Ceph died: ${why}`,
      hint: "start the command again; with --log-level debug the log has the stack",
    });
    for (let next = this.#answered(); next !== undefined; next = this.#answered()) next.reject(this.#failure);
  }

  end(): void {
    void this.#worker.terminate();
  }
}

function takeIdle(): KeeperThread | undefined {
  const thread = idle.pop();
  return thread?.isFit === false ? undefined : thread;
}

/** Starts the thread of the process's first image: it boots while the rest of the program is loaded. */
export function startKeeperEarly(): void {
  try {
    idle.push(new KeeperThread());
  } catch {
    // Whoever needs the thread tries again, and says why there is none.
  }
}

/** One image's keeper. */
export class RbdKeeper {
  readonly #thread: KeeperThread = takeIdle() ?? new KeeperThread();
  readonly #name: string;
  readonly #door: Door;
  #released: Promise<void> | undefined;

  constructor(name: string, door: SharedArrayBuffer) {
    this.#name = name;
    this.#door = new Door(door);
  }

  /**
   * @param isCancelled asked while the answer is awaited; true ends the wait with CANCELLED, and the keeper goes on
   * @throws CowcatcherError what the request failed with
   */
  async request(request: KeeperRequest, isCancelled?: () => boolean): Promise<Done> {
    const answer = this.#thread.ask(request);
    const reply = isCancelled === undefined ? await answer : await this.#unlessCancelled(answer, isCancelled);
    if (reply.kind === "done") return reply;
    throw new CowcatcherError({ ...reply.error, cause: reply.stack });
  }

  async #unlessCancelled(answer: Promise<KeeperReply>, isCancelled: () => boolean): Promise<KeeperReply> {
    // Nobody may be there any more when it comes.
    answer.catch(() => undefined);
    for (;;) {
      const timer = new AbortController();
      const tick = delay(CANCEL_POLL_MS, undefined, { signal: timer.signal }).catch(() => undefined);
      const reply = await Promise.race([answer, tick]);
      timer.abort();
      if (reply !== undefined) return reply;
      if (isCancelled()) {
        throw new CowcatcherError({
          code: "CANCELLED",
          object: this.#name,
          problem: "cancelled while Ceph was asked",
        });
      }
    }
  }

  /**
   * Closes the image; an unfinished one is removed. Returns when that is done, or after RELEASE_GRACE_MS, in which case
   * it will be done when Ceph answers. Never throws; idempotent.
   */
  async release(): Promise<void> {
    this.#door.decide(PHASE_CANCELLED);
    this.#released ??= this.#thread.ask({ kind: "release" }).then(
      () => this.#giveBack(),
      () => undefined,
    );
    await Promise.race([this.#released, delay(RELEASE_GRACE_MS, undefined, { ref: false })]);
  }

  #giveBack(): void {
    if (this.#thread.isFit && idle.length < KEPT_MAX) idle.push(this.#thread);
    else this.#thread.end();
  }
}
