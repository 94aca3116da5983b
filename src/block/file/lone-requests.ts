// Whether the end of a request to io_uring is waited for in the system call that hands it over.
//
// A guest that waits for each answer has one request in flight. To go back to the event loop meanwhile costs more than
// the request: the loop asks for events, sleeps, is woken by the eventfd, reads it, and asks again. Where nobody
// else wants the thread, it may as well sleep in that system call, as a plain pwrite would, and go on with the result.
//
// Nobody else: one request after another was alone in flight, and the loop had hardly more events than those requests
// make (one or two that bring it, one that ends it). Both are looked at in windows of some requests; a window that fails
// the test, and a wait that was longer than storage of this kind takes, ends it until a later window passes.

/** Requests. */
const WINDOW_TURNS = 32;
/** Events of the loop for each of them. */
const EVENTS_MAX = 4;
/** Windows without waiting after a wait in vain: a disk that is slow, or that has such moments. */
const PENALTY_WINDOWS = 8;

/** How many events libuv has handled; NaN, which no window passes, where Node does not say (22 before 22.8). */
function loopEvents(): number {
  const { uvMetricsInfo } = performance.nodeTiming as { uvMetricsInfo?: { events: number } };
  return uvMetricsInfo?.events ?? NaN;
}

/** One thread. */
export class LoneRequests {
  private turns = 0;
  private mayWait = false;
  private penalty = 0;
  private eventsBefore = 0;

  constructor(private readonly countEvents: () => number = loopEvents) {}

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
    if (this.turns === 0) this.eventsBefore = this.countEvents();
    else if (this.turns === WINDOW_TURNS) this.endWindow();
    this.turns++;
    return this.mayWait;
  }

  private endWindow(): void {
    const events = this.countEvents();
    const isQuiet = events - this.eventsBefore <= EVENTS_MAX * WINDOW_TURNS;
    this.mayWait = isQuiet && this.penalty === 0;
    if (this.penalty > 0) this.penalty--;
    this.turns = 0;
    this.eventsBefore = events;
  }

  /** The time was over, and the request is still in flight. */
  waitedInVain(): void {
    this.mayWait = false;
    this.penalty = PENALTY_WINDOWS;
  }
}
