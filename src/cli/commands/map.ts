import type { Command } from "commander";
import type { MapFlags } from "../actions/map.js";
import { forceShareOption, formatOption, parseImage, sizeOption, textOption } from "../options/options.js";
import { addKeyOptions } from "../options/repository-options.js";
import { define, addCommonOptions, type CommonFlags, type RunCommand } from "./definition.js";

export function addMap(program: Command, run: RunCommand): void {
  const command = define(program, "map", {
    summary: "which ranges of an image hold data, and where, as qemu-img map",
    usage: "[options] IMAGE",
    examples: [
      "cowcatcher map disk.qcow2",
      "cowcatcher map --json --start-offset 1G --max-length 64M disk.qcow2",
    ],
  })
    .argument("<IMAGE>", "path of the image, or an NBD URI")
    .addOption(formatOption("-f, --format <FMT>", "raw or qcow2 (probed)"))
    .addOption(forceShareOption())
    .addOption(sizeOption("-s, --start-offset <SIZE>", "where to begin (0)"))
    .addOption(sizeOption("-l, --max-length <SIZE>", "how much to show (the rest of the disk)"))
    .addOption(textOption("--snapshot <NAME>", "internal snapshot, by id or name: the disk as of it"));
  addCommonOptions(addKeyOptions(command)).action((image: string, flags: MapFlags & CommonFlags) =>
    run("map", flags, async (context) => {
      const path = parseImage(image);
      return (await import("../actions/map.js")).runMap(path, flags, context);
    }),
  );
}
