import type { Command } from "commander";
import type { CheckFlags } from "../actions/check.js";
import { forceShareOption, formatOption } from "../options/options.js";
import { define, addCommonOptions, type CommonFlags, type RunCommand } from "./definition.js";

export function addCheck(program: Command, run: RunCommand): void {
  const command = define(program, "check", {
    summary: "check a qcow2 image's metadata and repair it, as qemu-img check",
    usage: "[options] IMAGE",
    notes:
      "Without --repair it never writes. The codes are for what is left after a repair. Internal snapshots are never\n" +
      "discarded, and references that lead nowhere are left as they are.",
    examples: [
      "cowcatcher check disk.qcow2",
      "cowcatcher check --repair disk.qcow2",
      "cowcatcher check --repair leaks --json -f qcow2 disk.qcow2",
    ],
  })
    .argument("[IMAGE]", "path of the image")
    .addOption(formatOption("-f, --format <FMT>", "qcow2 (probed)"))
    .addOption(forceShareOption())
    .option("-r, --repair [WHAT]", "repair leaks only, or all that can be (all)");
  addCommonOptions(command).action((image: string | undefined, flags: CheckFlags & CommonFlags) =>
    run("check", flags, async (context) => {
      const { parseCheckRequest, runCheck } = await import("../actions/check.js");
      return runCheck(parseCheckRequest(image, flags), flags, context);
    }),
  );
}
