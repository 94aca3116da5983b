import type { Command } from "commander";
import { pathOption, textOption } from "../options/options.js";
import { define, addCommonOptions, type CommonFlags, type RunCommand } from "./definition.js";

export function addCheckpoints(program: Command, run: RunCommand): void {
  const command = define(program, "checkpoints", {
    summary: "list what a server remembers to have changed since when, or forget it",
    usage: "--control SOCK\n       cowcatcher checkpoints delete NAME [--disk NAME] --control SOCK",
    notes:
      "A checkpoint is the start of a good backup that was made with --checkpoint NAME; `backup --since NAME` copies what\n" +
      "has changed since then. The list shows for each how much that is now.",
    examples: [
      "cowcatcher checkpoints --control /run/vm1.ctl",
      "cowcatcher checkpoints delete weekly --control /run/vm1.ctl",
    ],
  })
    .argument("[ACTION]", "delete (list the checkpoints)")
    .argument("[NAME]", "the checkpoint")
    .addOption(textOption("--disk <NAME>", "delete: of this disk alone (of all disks)"))
    .addOption(pathOption("--control <SOCK>", "control socket of the server").makeOptionMandatory());
  addCommonOptions(command).action(
    (
      action: string | undefined,
      name: string | undefined,
      flags: { control: string; disk?: string } & CommonFlags,
    ) =>
      run("checkpoints", flags, async (context) => {
        const checkpoints = await import("../actions/checkpoints.js");
        return checkpoints.runCheckpoints(
          checkpoints.parseCheckpointsRequest(action, name, flags.disk),
          flags.control,
          context,
        );
      }),
  );
}
