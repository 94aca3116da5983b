// The one interface through which a command shows how far its jobs are, and the choice among its forms:
// bars on a terminal, plain lines elsewhere, JSON lines for scripts, or nothing.
//
// The caller may call `update` as often as it likes: each view limits its own rate. A view prints nothing after
// `stop`. All on the main thread.
import type { JobProgress } from "../../backup/progress.js";
import type { CowcatcherError } from "../../errors.js";
import type { OutputSettings } from "../context.js";
import type { Environment } from "../serve-options.js";

export interface JobInfo {
  jobId: string;
  /** Node name of the disk, or the source's path. */
  disk: string;
  target: string;
  totalBytes: number;
  /** A guest uses the disk: buffer and guest waits are shown. */
  live: boolean;
  /** Without an error at the end, the target was read back and is what was written. */
  verify?: boolean;
  /** Nothing is copied (sync none): no time left, no rate, and cancelling is the orderly end. */
  snapshotOnly?: boolean;
  /** Name of the export of the disk's T0 view, where there is one. */
  snapshotExport?: string | undefined;
}

export interface JobResult {
  progress: JobProgress;
  /** The first cause, if the job failed. */
  error: CowcatcherError | undefined;
}

export interface ProgressView {
  /** After T0, once for each job. */
  start(info: JobInfo): void;
  update(jobId: string, progress: JobProgress): void;
  finish(jobId: string, result: JobResult): void;
  /** Ends all output and timers, and gives the terminal back. May be called more than once. */
  stop(): void;
}

/** A view that can say at once where its jobs are. */
export interface PrintableView extends ProgressView {
  printNow(): void;
}

export type ProgressForm = "bars" | "lines" | "json" | "none";

/** Which form the user gets (CLI.md, Output). */
export function progressForm(
  { json, quiet, progress, stderr }: OutputSettings,
  environment: Environment,
): ProgressForm {
  if (quiet || progress === false) return "none";
  if (json) return "json";
  // A dumb terminal cannot move the cursor, so bars would scroll by.
  if (stderr.isTTY === true && environment["TERM"] !== "dumb") return "bars";
  return progress === true ? "lines" : "none";
}

/**
 * Makes the view that the settings ask for. Until `stop`, SIGUSR1 makes it print one progress line at once, in
 * every form but with --quiet.
 */
export async function createProgressView(
  output: OutputSettings,
  environment: Environment = process.env,
): Promise<ProgressView> {
  const view = await createForm(output, environment);
  if (output.quiet) return view;
  const onSignal = (): void => {
    view.printNow();
  };
  process.on("SIGUSR1", onSignal);
  return {
    start: (info) => {
      view.start(info);
    },
    update: (jobId, progress) => {
      view.update(jobId, progress);
    },
    finish: (jobId, result) => {
      view.finish(jobId, result);
    },
    stop: () => {
      process.removeListener("SIGUSR1", onSignal);
      view.stop();
    },
  };
}

async function createForm(output: OutputSettings, environment: Environment): Promise<PrintableView> {
  const form = progressForm(output, environment);
  switch (form) {
    case "bars":
      return new (await import("./terminal.js")).TerminalView(output.stderr, environment);
    case "json":
      return new (await import("./json.js")).JsonView(output);
    case "lines":
    case "none": {
      const { PlainView } = await import("./plain.js");
      return output.json
        ? new (await import("./json.js")).JsonView(output, { onRequestOnly: true })
        : new PlainView(output.stderr, { onRequestOnly: form === "none" });
    }
  }
}
