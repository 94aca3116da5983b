import type { Command } from "commander";
import type { CreateFlags } from "../actions/create.js";
import { formatOption, parseLocalImage, pathOption } from "../options/options.js";
import { define, addCommonOptions, type CommonFlags, type RunCommand } from "./definition.js";

export function addCreate(program: Command, run: RunCommand): void {
  const command = define(program, "create", {
    summary: "create an empty image, as qemu-img create",
    usage: "[options] IMAGE SIZE",
    notes: "SIZE may be left out with a backing file: it is the backing file's then.",
    examples: [
      "cowcatcher create -f qcow2 disk.qcow2 20G",
      "cowcatcher create -f qcow2 -o cluster_size=128K,extended_l2=on disk.qcow2 20G",
      "cowcatcher create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2",
    ],
  })
    .argument("<IMAGE>", "path of the image")
    .argument("[SIZE]", "size of the disk")
    .addOption(formatOption("-f, --format <FMT>", "raw or qcow2 (by IMAGE's extension, else raw)"))
    .addOption(pathOption("-b, --backing-file <FILE>", "backing file"))
    .addOption(formatOption("-F, --backing-format <FMT>", "format of the backing file: raw or qcow2"))
    .option("-o, --options <NAME=VALUE,...>", "options of the format", (text: string, earlier?: string) =>
      earlier === undefined ? text : `${earlier},${text}`,
    );
  addCommonOptions(command).action(
    (image: string, size: string | undefined, flags: CreateFlags & CommonFlags) =>
      run("create", flags, async (context) => {
        const path = parseLocalImage(image);
        return (await import("../actions/create.js")).runCreate(path, size, flags, context);
      }),
  );
}
