// Progress on a terminal: a bar for each job, on stderr, so that stdout stays free for the summary.
//
// cli-progress owns the cursor and the redraw timer; the text of a bar is ours, made anew at each redraw and cut to the
// terminal's width, so that no bar takes two rows, which would leave its remains behind at the next one. A window that
// becomes narrower breaks the lines that stand there: they are wiped with all their rows. A job in the background draws
// nothing, and begins afresh where it finds the cursor when it is back.
import { MultiBar, type Options, type Params, type SingleBar } from "cli-progress";
import type { JobProgress } from "../../backup/progress.js";
import type { Environment, TextOutput } from "../output/context.js";
import { coloured, hasColours } from "../output/colour.js";
import { WatchedJobs, type WatchedJob } from "./jobs.js";
import { bufferFraction, fractionDone } from "./pace.js";
import { progressLine } from "./plain.js";
import { isInForeground } from "./foreground.js";
import { bufferPart, rankedParts, type ProgressPart } from "./text.js";
import type { JobInfo, JobResult, PrintableView } from "./view.js";

const REDRAWS_A_SECOND = 5;
const BAR_COLUMNS = 20;
/** From here on there is room for a bar that is nice to look at. */
const WIDE_COLUMNS = 100;
const NARROW_BAR_COLUMNS = 10;
const MAX_NAME_COLUMNS = 24;
const DEFAULT_COLUMNS = 80;
const ALMOST_FULL = 0.75;

export class TerminalView implements PrintableView {
  private readonly jobs = new WatchedJobs();
  private readonly bars = new Map<string, SingleBar>();
  private readonly multibar: MultiBar;
  private readonly color: boolean;
  private stopped = false;

  readonly #lengths = new Map<string, number>();

  /** @param mayDraw asked before each write; false: in the background */
  constructor(
    private readonly output: TextOutput,
    environment: Environment,
    private readonly mayDraw: () => boolean = isInForeground,
  ) {
    this.color = hasColours(output, environment);
    this.multibar = new MultiBar({
      // A TextOutput that is a terminal is process.stderr; tests give a stream.
      stream: this.#gatedStream() as unknown as NodeJS.WritableStream,
      format: (_options: Options, _params: Params, payload: { job?: WatchedJob }) =>
        payload.job === undefined ? "" : this.draw(payload.job),
      fps: REDRAWS_A_SECOND,
      forceRedraw: true,
      // A shell that gets its terminal back from a job in the background would have none.
      hideCursor: false,
      linewrap: null,
      emptyOnZero: true,
      clearOnComplete: false,
      stopOnComplete: false,
      // Signals are the command's business.
      gracefulExit: false,
    });
    this.#resizes.on?.("resize", this.#onResize);
  }

  /** process.stderr tells of it; what a test gives need not. */
  get #resizes(): Partial<NodeJS.EventEmitter> {
    return this.output as Partial<NodeJS.EventEmitter>;
  }

  /** The terminal while this process is in its foreground; else nothing is written. */
  #gatedStream(): TextOutput {
    const { output, mayDraw } = this;
    let wasAway = false;
    const cursor = (): { dy: number } => (this.multibar as unknown as { terminal: { dy: number } }).terminal;
    return {
      isTTY: output.isTTY,
      get columns() {
        return output.columns;
      },
      write(text: string) {
        if (!mayDraw()) {
          wasAway = true;
          return true;
        }
        if (wasAway) cursor().dy = 0;
        wasAway = false;
        return output.write(text);
      },
    };
  }

  readonly #onResize = (): void => {
    if (this.stopped || !this.mayDraw()) return;
    const columns = this.output.columns || DEFAULT_COLUMNS;
    const rows = this.#drawn.map((length) => Math.max(1, Math.ceil(length / columns)));
    const above = rows.reduce((sum, count) => sum + count, 0) - 1;
    this.output.write(`\r${above > 0 ? `\u001b[${above}A` : ""}\u001b[0J`);
    (this.multibar as unknown as { terminal: { dy: number } }).terminal.dy = 0;
    this.multibar.update();
  };

  /** Columns of each bar as it was drawn last. */
  get #drawn(): number[] {
    return [...this.#lengths.values()];
  }

  start(info: JobInfo): void {
    const job = this.jobs.add(info);
    this.bars.set(info.jobId, this.multibar.create(Math.max(1, info.totalBytes), 0, { job }));
  }

  update(jobId: string, progress: JobProgress): void {
    const job = this.jobs.update(jobId, progress);
    if (job !== undefined) this.show(job, progress);
  }

  finish(jobId: string, { progress }: JobResult): void {
    const job = this.jobs.update(jobId, progress);
    if (job !== undefined) this.show(job, progress);
    this.jobs.remove(jobId);
    this.bars.get(jobId)?.stop();
  }

  stop(): void {
    if (this.stopped) return;
    this.stopped = true;
    this.#resizes.removeListener?.("resize", this.#onResize);
    this.multibar.stop();
  }

  /** Above the bars, as a line that stays. */
  printNow(): void {
    if (this.stopped) return;
    for (const job of this.jobs.values()) this.multibar.log(`${progressLine(job)}\n`);
  }

  private show(job: WatchedJob, progress: JobProgress): void {
    if (this.stopped) return;
    this.bars.get(job.info.jobId)?.update(progress.bytesDone, { job });
  }

  private draw(job: WatchedJob): string {
    // A pseudo-terminal that no one has sized says 0.
    const columns = this.output.columns || DEFAULT_COLUMNS;
    const text = barText(job, columns);
    this.#lengths.set(job.info.jobId, text.length);
    return colorBuffer(text, job.progress, this.color);
  }
}

/** "root [=====-----] 42%, 4.2 GiB of 10.0 GiB, …", with as many parts as fit in `columns`. */
export function barText({ info, pace, progress }: WatchedJob, columns: number): string {
  const name = shorten(info.disk, Math.min(MAX_NAME_COLUMNS, Math.floor(columns / 3)));
  if (progress === undefined) return `${name} [${bar(0)}]`;
  const parts = rankedParts(progress, {
    live: info.live,
    remainingMs: pace.remainingMs(progress),
    snapshotOnly: info.snapshotOnly,
  });
  const barColumns = columns < WIDE_COLUMNS ? NARROW_BAR_COLUMNS : BAR_COLUMNS;
  const head = `${name} [${bar(fractionDone(progress), barColumns)}] `;
  // The last column stays free: a cursor there wraps on some terminals.
  return head + fittingParts(parts, columns - 1 - head.length).join(", ");
}

/** As many parts as fit, chosen by rank, in their own order; the first in rank in any case. */
function fittingParts(parts: readonly ProgressPart[], columns: number): string[] {
  const kept = new Set<ProgressPart>();
  let used = -2;
  for (const part of parts.toSorted((a, b) => a.rank - b.rank)) {
    if (kept.size > 0 && used + 2 + part.text.length > columns) break;
    used += 2 + part.text.length;
    kept.add(part);
  }
  return parts.filter((part) => kept.has(part)).map(({ text }) => text);
}

function bar(fraction: number, columns = BAR_COLUMNS): string {
  const done = Math.floor(fraction * columns);
  return "=".repeat(done) + "-".repeat(columns - done);
}

/** The end of a path tells more than its beginning. */
function shorten(text: string, columns: number): string {
  return text.length <= columns ? text : `...${text.slice(text.length - Math.max(0, columns - 3))}`;
}

function colorBuffer(text: string, progress: JobProgress | undefined, color: boolean): string {
  if (!color || progress === undefined || bufferFraction(progress) < ALMOST_FULL) return text;
  const part = bufferPart(progress);
  return text.replace(part, coloured(part, "yellow", color));
}
