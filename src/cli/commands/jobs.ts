import type { Command } from "commander";
import { pathOption } from "../options/options.js";
import { define, addCommonOptions, type CommonFlags, type RunCommand } from "./definition.js";

export function addJobs(program: Command, run: RunCommand): void {
  const command = define(program, "jobs", {
    summary: "list the jobs of a server, or cancel, pause, resume, slow down one",
    usage:
      "--control SOCK\n       cowcatcher jobs cancel|pause|resume ID --control SOCK\n       cowcatcher jobs set-speed ID SIZE --control SOCK",
    examples: [
      "cowcatcher jobs --control /run/vm1.ctl",
      "cowcatcher jobs cancel root --control /run/vm1.ctl",
      "cowcatcher jobs set-speed root-2 50M --control /run/vm1.ctl",
    ],
  })
    .argument("[ACTION]", "cancel, pause, resume or set-speed (list the jobs)")
    .argument("[ID]", "the job, or the name of a disk that has one job")
    .argument("[SIZE]", "for set-speed: bytes a second, 0 for no limit")
    .addOption(pathOption("--control <SOCK>", "control socket of the server").makeOptionMandatory());
  addCommonOptions(command).action(
    (
      action: string | undefined,
      id: string | undefined,
      speed: string | undefined,
      flags: { control: string } & CommonFlags,
    ) =>
      run("jobs", flags, async (context) => {
        const jobs = await import("../actions/jobs.js");
        return jobs.runJobs(jobs.parseJobsRequest(action, id, speed), flags.control, context);
      }),
  );
}
