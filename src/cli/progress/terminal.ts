// Progress on a terminal: a bar for each job, on stderr, so that stdout stays free for the summary.
//
// cli-progress owns the cursor and the redraw timer; the text of a bar is ours, cut to the terminal's width so
// that no bar takes two rows, which would leave its remains behind at the next redraw.
import { MultiBar, type Options, type Params, type SingleBar } from "cli-progress";
import type { JobProgress } from "../../backup/progress.js";
import type { TextOutput } from "../output/context.js";
import type { Environment } from "../output/context.js";
import { WatchedJobs, type WatchedJob } from "./jobs.js";
import { bufferFraction, fractionDone } from "./pace.js";
import { progressLine } from "./plain.js";
import { bufferPart, progressParts } from "./text.js";
import type { JobInfo, JobResult, PrintableView } from "./view.js";

const REDRAWS_A_SECOND = 5;
const BAR_COLUMNS = 20;
const MAX_NAME_COLUMNS = 24;
const DEFAULT_COLUMNS = 80;
const ALMOST_FULL = 0.75;
const YELLOW = "\u001b[33m";
const RESET = "\u001b[0m";

export class TerminalView implements PrintableView {
  private readonly jobs = new WatchedJobs();
  private readonly bars = new Map<string, SingleBar>();
  private readonly multibar: MultiBar;
  private readonly color: boolean;
  private stopped = false;

  constructor(
    private readonly output: TextOutput,
    environment: Environment,
  ) {
    // https://no-color.org: set and not empty.
    this.color = (environment["NO_COLOR"] ?? "") === "";
    this.multibar = new MultiBar({
      // A TextOutput that is a terminal is process.stderr; tests give a stream.
      stream: output as NodeJS.WritableStream,
      format: (_options: Options, _params: Params, payload: { text?: string }) => payload.text ?? "",
      fps: REDRAWS_A_SECOND,
      hideCursor: true,
      linewrap: null,
      emptyOnZero: true,
      clearOnComplete: false,
      stopOnComplete: false,
      // Signals are the command's business.
      gracefulExit: false,
    });
  }

  start(info: JobInfo): void {
    const job = this.jobs.add(info);
    this.bars.set(
      info.jobId,
      this.multibar.create(Math.max(1, info.totalBytes), 0, { text: this.draw(job) }),
    );
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
    this.multibar.stop();
  }

  /** Above the bars, as a line that stays. */
  printNow(): void {
    if (this.stopped) return;
    for (const job of this.jobs.values()) this.multibar.log(`${progressLine(job)}\n`);
  }

  private show(job: WatchedJob, progress: JobProgress): void {
    if (this.stopped) return;
    this.bars.get(job.info.jobId)?.update(progress.bytesDone, { text: this.draw(job) });
  }

  private draw(job: WatchedJob): string {
    // A pseudo-terminal that no one has sized says 0.
    const columns = this.output.columns || DEFAULT_COLUMNS;
    return colorBuffer(barText(job, columns), job.progress, this.color);
  }
}

/** "root [=====-----] 42%, 4.2 GiB of 10.0 GiB, …", with as many parts as fit in `columns`. */
export function barText({ info, pace, progress }: WatchedJob, columns: number): string {
  const name = shorten(info.disk, Math.min(MAX_NAME_COLUMNS, Math.floor(columns / 3)));
  if (progress === undefined) return `${name} [${bar(0)}]`;
  const [first = "", ...parts] = progressParts(progress, {
    live: info.live,
    remainingMs: pace.remainingMs(progress),
    snapshotOnly: info.snapshotOnly,
  });
  let text = `${name} [${bar(fractionDone(progress))}] ${first}`;
  for (const part of parts) {
    // The last column stays free: a cursor there wraps on some terminals.
    if (text.length + 2 + part.length >= columns) break;
    text += `, ${part}`;
  }
  return text;
}

function bar(fraction: number): string {
  const done = Math.floor(fraction * BAR_COLUMNS);
  return "=".repeat(done) + "-".repeat(BAR_COLUMNS - done);
}

/** The end of a path tells more than its beginning. */
function shorten(text: string, columns: number): string {
  return text.length <= columns ? text : `...${text.slice(text.length - Math.max(0, columns - 3))}`;
}

function colorBuffer(text: string, progress: JobProgress | undefined, color: boolean): string {
  if (!color || progress === undefined || bufferFraction(progress) < ALMOST_FULL) return text;
  const part = bufferPart(progress);
  return text.replace(part, `${YELLOW}${part}${RESET}`);
}
