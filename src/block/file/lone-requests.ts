// Whether the end of a request to io_uring is waited for in the system call that hands it over.
//
// A guest that waits for each answer has one request in flight. To go back to the event loop meanwhile costs more than
// the request: the loop asks for events, sleeps, is woken by the eventfd, reads it, and asks again. Where nobody
// else wants the thread, it may as well sleep in that system call, as a plain pwrite would, and go on with the result.
//
// Nobody else: one request after another was alone in flight, and the loop has had nothing to do for most of the time in
// which it was not held up here. Both are looked at in windows of some requests; a window that fails the test, and a wait
// that was longer than storage of this kind takes, ends it until a later window passes.

/** Requests. */
const WINDOW_TURNS = 32;
/** Of the time, what the loop may have been at work for others and for the requests themselves. */
const BUSY_SHARE_MAX = 0.6;
/** Windows without waiting after a wait in vain: a disk that is slow, or that has such moments. */
const PENALTY_WINDOWS = 8;

/** Milliseconds, both: what time it is, and for how long the loop has not been idle. */
export interface LoopClock {
  nowMs(): number;
  activeMs(): number;
}

export const LOOP_CLOCK: LoopClock = {
  nowMs: () => performance.now(),
  activeMs: () => performance.eventLoopUtilization().active,
};

/** One thread. */
export class LoneRequests {
  private turns = 0;
  private mayWait = false;
  private penalty = 0;
  private startMs = 0;
  private startActiveMs = 0;
  private heldUpMs = 0;

  constructor(private readonly clock: LoopClock = LOOP_CLOCK) {}

  /**
   * Once for each time that something is handed over.
   * @param isAlone it is one request, and nothing else is in flight
   * @returns whether to wait for it
   */
  next(isAlone: boolean): boolean {
    if (!isAlone) {
      this.turns = 0;
      return (this.mayWait = false);
    }
    if (this.turns === 0) this.beginWindow();
    else if (this.turns === WINDOW_TURNS) {
      this.mayWait = this.wasQuiet() && this.penalty === 0;
      if (this.penalty > 0) this.penalty--;
      this.turns = 0;
      this.beginWindow();
    }
    this.turns++;
    return this.mayWait;
  }

  /** @param forMs the loop was held up for so long; @param inVain the request is still in flight */
  waited(forMs: number, inVain: boolean): void {
    this.heldUpMs += forMs;
    if (!inVain) return;
    this.mayWait = false;
    this.penalty = PENALTY_WINDOWS;
  }

  private beginWindow(): void {
    this.startMs = this.clock.nowMs();
    this.startActiveMs = this.clock.activeMs();
    this.heldUpMs = 0;
  }

  private wasQuiet(): boolean {
    const busyMs = this.clock.activeMs() - this.startActiveMs - this.heldUpMs;
    return busyMs <= BUSY_SHARE_MAX * (this.clock.nowMs() - this.startMs);
  }
}
