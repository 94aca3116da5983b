// The hook's phases around one try's T0.
//
//   backup-start ─► the backup: … freeze ─► t0 ─► T0 ─► the agent's thaw ─► "started" ─► thaw, while data are copied …
//        └─ any failure before ──────────────────────────────────────────────────────► thaw
//
// t0 comes with `freeze` alone: without it nothing holds still for it. thaw comes once a try, never while t0 is under way,
// and not to a machine that is off, which has no T0 to wait for.
import { type CowcatcherError, toCowcatcherError } from "../errors.js";
import { GateKeeper } from "./gate-keeper.js";
import type { Job } from "./job.js";
import { isObject } from "./outcome.js";

export interface HookRunner {
  /** @throws CowcatcherError where it fails */
  run(phase: "t0"): Promise<void>;
  /** Never rejects. */
  cleanUp(phase: "thaw"): Promise<void>;
}

export interface GatedBackup {
  /** Further arguments of `backup`. */
  args: readonly string[];
  onMessage: (message: unknown) => void;
}

export class T0Phases {
  readonly #job: Pick<Job, "hook" | "options" | "source">;
  readonly #hooks: HookRunner;
  #thawing: Promise<void> | undefined;

  constructor(job: Pick<Job, "hook" | "options" | "source">, hooks: HookRunner) {
    this.#job = job;
    this.#hooks = hooks;
  }

  /** Runs a backup; what t0 failed by, where it did, is why the backup failed. Rejects as `backup`, or IO. */
  async around<T>(
    backup: (gated: GatedBackup) => Promise<T>,
  ): Promise<{ result: T; refused: CowcatcherError | undefined }> {
    let refused: CowcatcherError | undefined;
    const gate = await this.#openGate(async () => {
      try {
        await this.#hooks.run("t0");
      } catch (error) {
        refused = toCowcatcherError(error);
        throw refused;
      }
    });
    try {
      const args = gate === undefined ? [] : [`--t0-gate=${gate.path}`];
      const result = await backup({ args, onMessage: (message) => this.#note(message) });
      return { result, refused };
    } finally {
      await gate?.close();
    }
  }

  /** Once, however often it is called; fulfilled when it is over. */
  thaw(): Promise<void> {
    const { hook, source } = this.#job;
    if (hook === undefined || source.kind === "images") return Promise.resolve();
    this.#thawing ??= this.#hooks.cleanUp("thaw");
    return this.#thawing;
  }

  #note(message: unknown): void {
    if (isObject(message) && message["message_type"] === "started") void this.thaw();
  }

  async #openGate(pass: () => Promise<void>): Promise<GateKeeper | undefined> {
    const { hook, options, source } = this.#job;
    if (hook === undefined || !options.some((option) => option.startsWith("--freeze="))) return undefined;
    return GateKeeper.open(pass, source.kind === "control" ? source.socket : undefined);
  }
}
