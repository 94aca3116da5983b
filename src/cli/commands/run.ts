import type { Command } from "commander";
import { addRunOptions, parseRunRequest, type RunFlags } from "../options/run-options.js";
import { define, addCommonOptions, type CommonFlags, type RunCommand } from "./definition.js";

export function addRun(program: Command, run: RunCommand): void {
  const command = define(program, "run", {
    summary: "make the backups of job files: what cron and systemd start",
    usage:
      "[options] JOB...\n       cowcatcher run [options] --all\n       cowcatcher run --check [--config DIR]",
    notes:
      "A job file is YAML: docs/jobs.md has all keys. Each backup is a `cowcatcher backup` of its own; a job that fails does\n" +
      "not stop the others, and the exit code is the worst of all. A job file that is wrong counts as a failed job; the jobs of\n" +
      "other files are run all the same. A job outside of its window is skipped, which is no failure.\n" +
      "Of plain files old backups are removed by whole chains, and only those that have a manifest (FILE.json) of the job.\n" +
      "Not supported in this version: chains of files of machines that are off.",
    examples: ["cowcatcher run --check", "cowcatcher run --all --parallel 2", "cowcatcher run vm1 --dry-run"],
  }).argument("[JOBS...]", "names of jobs");
  addCommonOptions(addRunOptions(command)).action((names: string[], flags: RunFlags & CommonFlags) =>
    run("run", flags, async (context) => {
      const request = parseRunRequest(names, flags);
      return (await import("../actions/run.js")).runRun(request, context);
    }),
  );
}
