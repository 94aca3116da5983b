import type { Command } from "commander";
import type { CompareFlags } from "../actions/compare.js";
import { forceShareOption, formatOption, parseImage, textOption } from "../options/options.js";
import { addKeyOptions } from "../options/repository-options.js";
import { define, addCommonOptions, type CommonFlags, type RunCommand } from "./definition.js";

export function addCompare(program: Command, run: RunCommand): void {
  const command = define(program, "compare", {
    summary: "whether two images have the same content, as qemu-img compare",
    usage: "[options] A B",
    examples: [
      "cowcatcher compare disk.qcow2 /backup/disk.qcow2",
      "cowcatcher compare -f raw -F qcow2 a.img b.qcow2",
    ],
  })
    .argument("<A>", "path of the first image, or an NBD URI")
    .argument("<B>", "path of the second image, or an NBD URI")
    .addOption(formatOption("-f, --format <FMT>", "of A: raw or qcow2 (probed)"))
    .addOption(formatOption("-F, --format2 <FMT>", "of B: raw or qcow2 (probed)"))
    .addOption(forceShareOption())
    .option("-s, --strict", "different sizes and allocation are differences, too")
    .addOption(textOption("--snapshot <NAME>", "internal snapshot of A, by id or name: the disk as of it"));
  addCommonOptions(addKeyOptions(command)).action((a: string, b: string, flags: CompareFlags & CommonFlags) =>
    run("compare", flags, async (context) => {
      const paths = [parseImage(a, "A"), parseImage(b, "B")] as const;
      return (await import("../actions/compare.js")).runCompare(...paths, flags, context);
    }),
  );
}
