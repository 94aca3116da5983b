// The choice among the forms of progress. Each form is loaded when it is chosen.
import type { Environment, OutputSettings } from "../output/context.js";
import type { PrintableView, ProgressView } from "./view.js";

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
