import type { Command } from "commander";
import { addBenchOptions, parseBenchSettings, type BenchFlags } from "../options/bench-options.js";
import { define, addCommonOptions, type CommonFlags, type RunCommand } from "./definition.js";

export function addBench(program: Command, run: RunCommand): void {
  const command = define(program, "bench", {
    summary: "measure a guest's writes with no backup, an unbuffered and a buffered one",
    usage: "[options]",
    notes:
      "Makes a test disk, serves it to a guest of its own that writes at random places, and backs it up meanwhile.\n" +
      "The guest writes before, during and after the backup; a terminal shows that as a picture, --plot draws it. What is\n" +
      "measured is --runtime from T0 on. Everything that it makes but the plot is removed. The figures are of one run: for a fair comparison, run it several times.",
    examples: [
      "cowcatcher bench --dir /var/lib/vm",
      "cowcatcher bench --dir /var/lib/vm --plot guest.svg",
      "cowcatcher bench --dir /var/lib/vm --target /mnt/backup/test.qcow2 --rate-limit 0",
      "cowcatcher bench --json --size 4G -f qcow2 --block-size 4K --iodepth 32 --runtime 10s",
    ],
  });
  addCommonOptions(addBenchOptions(command)).action((flags: BenchFlags & CommonFlags) =>
    run("bench", flags, async (context) => {
      const settings = parseBenchSettings(flags);
      return (await import("../actions/bench.js")).runBench(settings, context);
    }),
  );
}
