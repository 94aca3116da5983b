// The forms of progress and summary: when which, how often, and what they say.
import { PassThrough } from "node:stream";
import { describe, expect, it } from "vitest";
import type { JobProgress } from "../../../src/backup/progress.js";
import type { OutputSettings, TextOutput } from "../../../src/cli/output/context.js";
import { JsonView } from "../../../src/cli/progress/json.js";
import { Pace } from "../../../src/cli/progress/pace.js";
import { PlainView } from "../../../src/cli/progress/plain.js";
import { TerminalView, barText } from "../../../src/cli/progress/terminal.js";
import { createProgressView, progressForm } from "../../../src/cli/progress/create-view.js";
import type { JobInfo } from "../../../src/cli/progress/view.js";
import { printSummary, summaryLines } from "../../../src/cli/progress/summary.js";
import { CowcatcherError } from "../../../src/errors.js";
import { isForegroundStat } from "../../../src/cli/progress/foreground.js";
import { packageVersion } from "../../../src/cli/version.js";
import { GiB, KiB, MiB } from "../../../src/units.js";

const INFO: JobInfo = { jobId: "j1", disk: "root", target: "/b/root.img", totalBytes: 10 * GiB, live: true };

const PROGRESS: JobProgress = {
  bytesDone: 5 * GiB,
  bytesTotal: 10 * GiB,
  bytesWritten: 2 * GiB,
  bufferBytesUsed: 64 * MiB,
  bufferBytesTotal: 256 * MiB,
  captureCount: 1234,
  capturedBytes: 80 * MiB,
  spilledBytes: 3 * MiB,
  guestWaitCount: 2,
  guestWaitMsMax: 12.4,
  guestWaitMsTotal: 20,
  guestWaitCounts: [],
  targetRate: 50 * MiB,
  elapsedMs: 60_000,
  ignoredErrorCount: 0,
};

class Sink implements TextOutput {
  text = "";
  constructor(
    readonly isTTY = false,
    readonly columns = 200,
  ) {}
  write(text: string): void {
    this.text += text;
  }
  get lines(): string[] {
    return this.text.split("\n").slice(0, -1);
  }
}

function settings(overrides: Partial<OutputSettings> = {}): OutputSettings & { stdout: Sink; stderr: Sink } {
  return {
    json: false,
    quiet: false,
    progress: undefined,
    ...overrides,
    stdout: new Sink(),
    stderr: (overrides.stderr as Sink | undefined) ?? new Sink(),
  };
}

/** All that was written: from Node 26 on read() gives one chunk a call. */
function writtenTo(stream: PassThrough): string {
  const chunks: Buffer[] = [];
  for (let chunk; (chunk = stream.read() as Buffer | null) !== null;) chunks.push(chunk);
  return Buffer.concat(chunks).toString();
}

const UTC = /^\d{4}-\d\d-\d\dT[\d:.]+Z$/;

describe("which form", () => {
  it.each([
    // terminal, json, quiet, progress, form
    [true, false, false, undefined, "bars"],
    [true, false, false, true, "bars"],
    [true, false, false, false, "none"],
    [true, false, true, true, "none"],
    [false, false, false, undefined, "none"],
    [false, false, false, true, "lines"],
    [false, false, false, false, "none"],
    [false, false, true, true, "none"],
    [true, true, false, undefined, "json"],
    [false, true, false, true, "json"],
    [false, true, false, false, "none"],
    [false, true, true, undefined, "none"],
  ] as const)("terminal %s, --json %s, --quiet %s, progress %s: %s", (tty, json, quiet, progress, form) => {
    expect(progressForm(settings({ json, quiet, progress, stderr: new Sink(tty) }), {})).toBe(form);
  });

  it("draws no bars on a dumb terminal", () => {
    expect(progressForm(settings({ stderr: new Sink(true) }), { TERM: "dumb" })).toBe("none");
  });
});

describe("plain lines", () => {
  it("come every five seconds at most", () => {
    const sink = new Sink();
    let nowMs = 0;
    const view = new PlainView(sink, { onRequestOnly: false }, () => nowMs);
    view.start(INFO);
    for (; nowMs <= 12_000; nowMs += 100) view.update("j1", { ...PROGRESS, elapsedMs: nowMs });
    expect(sink.lines).toHaveLength(2);
    view.stop();
    view.update("j1", { ...PROGRESS, elapsedMs: 90_000 });
    expect(sink.lines).toHaveLength(2);
  });

  it("say everything in one line", () => {
    const sink = new Sink();
    const view = new PlainView(sink, { onRequestOnly: true }, () => 0);
    view.start(INFO);
    view.printNow();
    view.update("j1", PROGRESS);
    view.printNow();
    expect(sink.lines).toEqual([
      "root: started",
      "root: 50%, 5.00 GiB of 10.0 GiB, 50.0 MiB/s, 1:00 left, buffer 25%, longest guest wait 12 ms, 3.00 MiB spilled",
    ]);
  });

  it("leave out buffer and guest where no guest is", () => {
    const sink = new Sink();
    const view = new PlainView(sink, { onRequestOnly: true });
    view.start({ ...INFO, live: false });
    view.update("j1", { ...PROGRESS, spilledBytes: 0 });
    view.printNow();
    expect(sink.text).toBe("root: 50%, 5.00 GiB of 10.0 GiB, 50.0 MiB/s, 1:00 left\n");
  });

  it("are about running jobs alone", () => {
    const sink = new Sink();
    const view = new PlainView(sink, { onRequestOnly: true });
    view.start(INFO);
    view.start({ ...INFO, jobId: "j2", disk: "data" });
    view.finish("j1", { progress: PROGRESS, error: undefined });
    view.update("j1", PROGRESS);
    view.printNow();
    expect(sink.text).toBe("data: started\n");
  });
});

describe("JSON lines", () => {
  it("have restic's names", () => {
    const output = settings({ json: true });
    let nowMs = 0;
    const view = new JsonView(output, { onRequestOnly: false }, () => nowMs);
    view.start(INFO);
    for (; nowMs <= 2000; nowMs += 50) view.update("j1", PROGRESS);
    const messages = output.stdout.lines.map((line) => JSON.parse(line) as unknown);
    expect(messages).toHaveLength(3);
    expect(messages[0]).toEqual({
      message_type: "started",
      time: expect.stringMatching(UTC) as string,
      version: packageVersion(),
      job: "j1",
      disk: "root",
      target: "/b/root.img",
      target_format: null,
      total_bytes: 10 * GiB,
      data_bytes: null,
      live: true,
      t0: null,
    });
    expect(messages[1]).toEqual({
      message_type: "status",
      time: expect.stringMatching(UTC) as string,
      job: "j1",
      disk: "root",
      percent_done: 0.5,
      total_bytes: 10 * GiB,
      bytes_done: 5 * GiB,
      bytes_written: 2 * GiB,
      rate: 50 * MiB,
      seconds_elapsed: 60,
      seconds_remaining: 60,
      captures: 1234,
      captured_bytes: 80 * MiB,
      spilled_bytes: 3 * MiB,
      buffer_bytes_used: 64 * MiB,
      buffer_bytes_total: 256 * MiB,
      guest_waits: 2,
      guest_wait_ms_max: 12.4,
      guest_wait_ms_total: 20,
      ignored_errors: 0,
    });
  });

  it("are one line whatever a target is called", () => {
    const output = settings({ json: true });
    new JsonView(output).start({ ...INFO, target: "a\nb" });
    expect(output.stdout.lines).toHaveLength(1);
  });

  it("still start, but have no status with --no-progress", async () => {
    const output = settings({ json: true, progress: false });
    const view = await createProgressView(output, {});
    view.start(INFO);
    view.update("j1", PROGRESS);
    view.stop();
    expect(
      output.stdout.lines.map((line) => (JSON.parse(line) as { message_type: string }).message_type),
    ).toEqual(["started"]);
  });
});

describe("bars", () => {
  function watched(progress: JobProgress | undefined) {
    const pace = new Pace();
    if (progress !== undefined) pace.add(progress);
    return { info: INFO, pace, progress };
  }

  it("show as many parts as the terminal has room for", () => {
    expect(barText(watched(PROGRESS), 200)).toBe(
      "root [==========----------] 50%, 5.00 GiB of 10.0 GiB, 50.0 MiB/s, 1:00 left, buffer 25%, " +
        "longest guest wait 12 ms, 3.00 MiB spilled",
    );
    expect(barText(watched(PROGRESS), 80)).toBe(
      "root [=====-----] 50%, 50.0 MiB/s, 1:00 left, longest guest wait 12 ms",
    );
    expect(barText(watched(PROGRESS), 60)).toBe("root [=====-----] 50%, 1:00 left, longest guest wait 12 ms");
    expect(barText(watched(PROGRESS), 50)).toBe("root [=====-----] 50%, longest guest wait 12 ms");
    for (let columns = 40; columns < 200; columns++) {
      expect(barText(watched(PROGRESS), columns).length).toBeLessThan(columns + 1);
    }
  });

  it("wipe all rows that a narrower window has made of them, and fit it", () => {
    const stream = Object.assign(new PassThrough(), { isTTY: true, columns: 120, rows: 24 });
    const view = new TerminalView(stream, {}, () => true);
    view.start(INFO);
    view.update("j1", PROGRESS);
    stream.emit("resize");
    writtenTo(stream);
    stream.columns = 40;
    stream.emit("resize");
    const text = writtenTo(stream);
    view.stop();
    expect(text).toContain("\r\u001b[2A\u001b[0J");
    expect(text).toContain(barText(watched(PROGRESS), 40));
    stream.emit("resize");
  });

  it("are silent in the background, and drawn again in the foreground", () => {
    const stream = Object.assign(new PassThrough(), { isTTY: true, columns: 80, rows: 24 });
    let isForeground = false;
    const view = new TerminalView(stream, {}, () => isForeground);
    view.start(INFO);
    view.update("j1", PROGRESS);
    stream.emit("resize");
    expect(writtenTo(stream)).toBe("");
    isForeground = true;
    stream.emit("resize");
    expect(writtenTo(stream)).toContain("root [");
    view.stop();
  });

  it("know the foreground by the terminal's process group", () => {
    const stat = (group: number, terminalGroup: number): string =>
      `7 (a) b) S 1 ${group} 3 34816 ${terminalGroup} 4194304 0`;
    expect(isForegroundStat(stat(5, 5))).toBe(true);
    expect(isForegroundStat(stat(5, 6))).toBe(false);
    expect(isForegroundStat(stat(5, -1))).toBe(true);
  });

  it("take a terminal without a size for one of 80 columns", () => {
    const stream = Object.assign(new PassThrough(), { isTTY: true, columns: 0, rows: 0 });
    const view = new TerminalView(stream, {}, () => true);
    view.start(INFO);
    view.update("j1", PROGRESS);
    view.stop();
    expect(writtenTo(stream)).toContain("root [=====-----] 50%, 50.0 MiB/s, 1:00 left");
  });

  it("stay on stderr, in colour unless NO_COLOR is set, and give the cursor back", () => {
    const almostFull = { ...PROGRESS, bufferBytesUsed: 250 * MiB };
    for (const [environment, color] of [
      [{}, true],
      [{ NO_COLOR: "1" }, false],
      [{ NO_COLOR: "" }, true],
    ] as const) {
      const stream = Object.assign(new PassThrough(), { isTTY: true, columns: 200, rows: 50 });
      const chunks: string[] = [];
      stream.on("data", (chunk: Buffer) => chunks.push(chunk.toString()));
      const view = new TerminalView(stream, environment, () => true);
      view.start(INFO);
      view.update("j1", almostFull);
      view.printNow();
      view.finish("j1", { progress: almostFull, error: undefined });
      view.stop();
      view.stop();
      const text = chunks.join("");
      expect(text).toContain("buffer 97%");
      expect(text.includes("\u001b[33m")).toBe(color);
      expect(text).not.toContain("\u001b[?25l");
    }
  });
});

describe("pace", () => {
  it("goes by the data that is left where the source's size is mostly holes", () => {
    const pace = new Pace(1 * GiB);
    // 100 MiB of data a second from the disk's beginning; all that follows is a hole.
    for (let second = 1; second <= 2; second++) {
      const bytes = second * 100 * MiB;
      pace.add({ elapsedMs: second * 1000, bytesDone: bytes, bytesWritten: bytes });
    }
    const now = { ...PROGRESS, elapsedMs: 2000, bytesDone: 200 * MiB, bytesWritten: 200 * MiB };
    expect(pace.remainingMs(now)).toBeCloseTo(8240, 0);
    expect(pace.remainingMs({ ...now, bytesDone: 10 * GiB - 50 * MiB })).toBeCloseTo(500, 0);
  });

  it("goes by the size again where there was more data than the source took of its storage", () => {
    const pace = new Pace(1 * MiB);
    pace.add({ elapsedMs: 1000, bytesDone: 1 * GiB, bytesWritten: 1 * GiB });
    const now = { ...PROGRESS, elapsedMs: 1000, bytesDone: 1 * GiB, bytesWritten: 1 * GiB };
    expect(pace.remainingMs(now)).toBeCloseTo(9000, 0);
  });

  it("follows the last seconds, not the average", () => {
    const pace = new Pace();
    // 9 GiB of holes in the first second, then 10 MiB a second.
    for (let second = 1; second <= 60; second++) {
      pace.add({ elapsedMs: second * 1000, bytesDone: 9 * GiB + (second - 1) * 10 * MiB, bytesWritten: 0 });
    }
    const progress = { ...PROGRESS, elapsedMs: 60_000, bytesDone: 9 * GiB + 590 * MiB };
    expect(pace.remainingMs(progress)).toBeCloseTo((434 / 10) * 1000, -2);
  });

  it("knows nothing of a job that stands still, and that a finished one is done", () => {
    const pace = new Pace();
    expect(pace.remainingMs({ ...PROGRESS, bytesDone: 0, elapsedMs: 5000 })).toBeUndefined();
    expect(pace.remainingMs({ ...PROGRESS, bytesDone: 10 * GiB })).toBe(0);
  });
});

describe("SIGUSR1", () => {
  it("prints one line at once, and no more after stop", async () => {
    const output = settings();
    const view = await createProgressView(output, {});
    view.start(INFO);
    view.update("j1", PROGRESS);
    expect(output.stderr.text).toBe("");
    process.emit("SIGUSR1");
    expect(output.stderr.lines).toHaveLength(1);
    view.stop();
    process.emit("SIGUSR1");
    expect(output.stderr.lines).toHaveLength(1);
  });

  it("prints nothing with --quiet", async () => {
    const output = settings({ quiet: true });
    const view = await createProgressView(output, {});
    const listenerCount = process.listenerCount("SIGUSR1");
    view.start(INFO);
    expect(listenerCount).toBe(0);
    view.stop();
    expect(output.stderr.text + output.stdout.text).toBe("");
  });
});

describe("summary", () => {
  it("says bytes, time, rate, captures, spill and waits", () => {
    const done = { ...PROGRESS, bytesDone: 10 * GiB, elapsedMs: 125_000 };
    expect(summaryLines(INFO, done)).toEqual([
      "root -> /b/root.img: 10.0 GiB in 2:05 (81.9 MiB/s), 2.00 GiB written",
      "  1234 captures (80.0 MiB), 3.00 MiB spilled, 2 guest writes waited, the longest 12 ms",
    ]);
    expect(summaryLines(INFO, { ...done, captureCount: 1, guestWaitCount: 0, ignoredErrorCount: 1 })).toEqual(
      [
        "root -> /b/root.img: 10.0 GiB in 2:05 (81.9 MiB/s), 2.00 GiB written",
        "  1 capture (80.0 MiB), 3.00 MiB spilled, no guest write waited",
        "  1 error ignored as asked: the backup has gaps",
      ],
    );
    expect(summaryLines({ ...INFO, live: false }, done)).toHaveLength(1);
  });

  it("is one JSON line with --json, also with --quiet", () => {
    const output = settings({ json: true, quiet: true });
    printSummary(output, INFO, { ...PROGRESS, bytesDone: 10 * GiB, elapsedMs: 10_000 });
    expect(output.stdout.lines).toHaveLength(1);
    expect(JSON.parse(output.stdout.text)).toEqual({
      message_type: "summary",
      time: expect.stringMatching(UTC) as string,
      version: packageVersion(),
      target_format: null,
      t0: null,
      bytes_on_target: null,
      disk_rate: GiB,
      job: "j1",
      disk: "root",
      target: "/b/root.img",
      bytes: 10 * GiB,
      bytes_written: 2 * GiB,
      seconds: 10,
      rate: Math.round((2 * GiB) / 10),
      captures: 1234,
      captured_bytes: 80 * MiB,
      spilled_bytes: 3 * MiB,
      guest_waits: 2,
      guest_wait_ms_max: 12.4,
      guest_wait_ms_total: 20,
      ignored_errors: 0,
      verified: false,
    });
  });

  it("says that the target was verified", () => {
    expect(summaryLines({ ...INFO, live: false, verify: true }, PROGRESS)).toEqual([
      expect.stringMatching(/ written, verified$/),
    ]);
  });

  it("is nothing with --quiet, and finite for a backup that took no time", () => {
    const quiet = settings({ quiet: true });
    printSummary(quiet, INFO, PROGRESS);
    expect(quiet.stdout.text).toBe("");
    const text = settings();
    printSummary(text, { ...INFO, live: false }, { ...PROGRESS, elapsedMs: 0, bytesWritten: 64 * KiB });
    expect(text.stdout.text).toBe("root -> /b/root.img: 10.0 GiB in 0 ms (0 B/s), 64.0 KiB written\n");
  });
});

describe("results", () => {
  it("may carry an error", async () => {
    const view = await createProgressView(settings(), {});
    const error = new CowcatcherError({ code: "IO", object: "t", problem: "is gone" });
    view.start(INFO);
    expect(() => {
      view.finish("j1", { progress: PROGRESS, error });
    }).not.toThrow();
    view.stop();
  });
});
