// What the definitions of all commands share: help with exit codes and examples, the options that every command takes.
import { Option, type Command } from "commander";
import { DEFAULT_LOG_LEVEL, LOG_LEVELS, type LogLevel } from "../../log-levels.js";
import { choiceOption, pathOption } from "../options/options.js";
import type { CommandContext } from "../output/context.js";
import { exitCodesHelp, type CommandName } from "../output/exit-codes.js";

/** The options that every command takes. */
export interface CommonFlags {
  json?: boolean;
  logFile?: string;
  logLevel?: LogLevel;
  quiet?: boolean;
  progress?: boolean;
}

/** Runs a command's body with its context and keeps its exit code. */
export type RunCommand = (
  command: CommandName,
  flags: CommonFlags,
  body: (context: CommandContext) => Promise<number>,
) => Promise<void>;

export interface CommandHelp {
  summary: string;
  usage: string;
  /** Further text, such as what it does not do. */
  notes?: string;
  examples: readonly string[];
}

export function define(program: Command, name: CommandName, help: CommandHelp): Command {
  const examples = ["Examples:", ...help.examples.map((line) => `  ${line}`)].join("\n");
  const notes = help.notes === undefined ? "" : `${help.notes}\n\n`;
  return program
    .command(name)
    .summary(help.summary)
    .description(help.summary)
    .usage(help.usage)
    .addHelpText("after", `\n${notes}${exitCodesHelp(name)}\n\n${examples}`);
}

export function addCommonOptions(command: Command): Command {
  return command
    .option("--json", "results, progress and errors as JSON on stdout")
    .addOption(new Option("-p, --progress", "report progress, on a terminal or not"))
    .option("--no-progress", "report no progress")
    .option("-q, --quiet", "nothing but errors and what was asked for")
    .addOption(pathOption("--log-file <FILE>", "append the log to FILE (stderr)"))
    .addOption(
      choiceOption("--log-level <LEVEL>", `${LOG_LEVELS.join(", ")} (${DEFAULT_LOG_LEVEL})`, LOG_LEVELS),
    );
}
