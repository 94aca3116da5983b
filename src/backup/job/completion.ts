// When jobs that have copied everything come to their end: alone, or all of a group together (the completion-mode `grouped`
// of QEMU's transactions, job.c), by themselves or when they are told to.
//
//   waiting   until all of the group are
//   pending   until somebody says job-finalize, if one of the group has auto-finalize off: to any of them
//
// One that fails does not arrive; whoever started the group cancels the others. Main thread.

export class Completion {
  readonly #allWaiting: Promise<void>;
  readonly #finalized: Promise<void>;
  #waitingCount = 0;
  #release: () => void = () => {};
  #finalize: () => void = () => {};

  constructor(
    readonly memberCount: number,
    readonly isAutomatic: boolean,
  ) {
    this.#allWaiting = new Promise((resolve) => {
      this.#release = resolve;
    });
    this.#finalized = new Promise((resolve) => {
      this.#finalize = resolve;
    });
    if (isAutomatic) this.#finalize();
  }

  /** Undefined for a job that waits for nothing and nobody. */
  static of(members: readonly { autoFinalize?: boolean | undefined }[]): Completion | undefined {
    const isAutomatic = members.every(({ autoFinalize }) => autoFinalize !== false);
    return isAutomatic && members.length <= 1 ? undefined : new Completion(members.length, isAutomatic);
  }

  /** A member is waiting: fulfilled when all are. */
  arrive(): Promise<void> {
    this.#waitingCount++;
    if (this.#waitingCount === this.memberCount) this.#release();
    return this.#allWaiting;
  }

  /** Fulfilled when the members, which are pending, may end. */
  get finalized(): Promise<void> {
    return this.#finalized;
  }

  /** Of a member that is pending. */
  finalize(): void {
    this.#finalize();
  }
}
