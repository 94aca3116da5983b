import type { Command } from "commander";
import type { InfoFlags } from "../actions/info.js";
import { forceShareOption, formatOption, parseImage } from "../options/options.js";
import { addKeyOptions } from "../options/repository-options.js";
import { define, addCommonOptions, type CommonFlags, type RunCommand } from "./definition.js";

export function addInfo(program: Command, run: RunCommand): void {
  const command = define(program, "info", {
    summary: "what an image is, as qemu-img info",
    usage: "[options] IMAGE",
    examples: ["cowcatcher info disk.qcow2", "cowcatcher info --json --backing-chain -U disk.qcow2"],
  })
    .argument("<IMAGE>", "path of the image, or an NBD URI")
    .addOption(formatOption("-f, --format <FMT>", "raw or qcow2 (probed)"))
    .addOption(forceShareOption())
    .option("--backing-chain", "describe the backing files as well");
  addCommonOptions(addKeyOptions(command)).action((image: string, flags: InfoFlags & CommonFlags) =>
    run("info", flags, async (context) => {
      const path = parseImage(image);
      return (await import("../actions/info.js")).runInfo(path, flags, context);
    }),
  );
}
