// commander's own complaints, turned into this program's one form: OBJECT: what is wrong (what to do).
import { CommanderError } from "commander";
import { toCowcatcherError, type CowcatcherError } from "../../errors.js";
import type { CommandName } from "../output/exit-codes.js";
import { usageError } from "./options.js";

/** True where commander has printed what was asked for (--help, --version) and only wants to end. */
export function isFinishedRequest(thrown: unknown): boolean {
  return thrown instanceof CommanderError && thrown.exitCode === 0;
}

/** Whatever parsing or running a command threw, as the error that the user sees. */
export function asReportedError(thrown: unknown, command: CommandName | undefined): CowcatcherError {
  return thrown instanceof CommanderError ? fromCommander(thrown, command) : toCowcatcherError(thrown);
}

function fromCommander({ code, message }: CommanderError, command: CommandName | undefined): CowcatcherError {
  const help = `see cowcatcher ${command === undefined ? "" : `${command} `}--help`;
  const subject = /'([^']*)'/.exec(message)?.[1] ?? "";
  const option = /--[\w-]+/.exec(subject)?.[0] ?? subject;
  switch (code) {
    case "commander.unknownOption":
      return unknownOption(subject, suggestionIn(message) ?? help);
    case "commander.unknownCommand":
      return usageError(subject, "is not a command", suggestionIn(message) ?? help);
    case "commander.missingArgument":
      return usageError(subject, "is missing", help);
    case "commander.optionMissingArgument":
      return usageError(option, "needs a value", help);
    case "commander.missingMandatoryOptionValue":
      return usageError(option, "is missing", help);
    case "commander.excessArguments":
      return usageError(command ?? "cowcatcher", "too many arguments", help);
    case "commander.help":
      return usageError("COMMAND", "is missing", help);
    default:
      return usageError(command ?? "cowcatcher", message.replace(/^error: /, ""), help);
  }
}

function unknownOption(flag: string, hint: string): CowcatcherError {
  return usageError(flag, "is not an option", hint);
}

/** commander's "(Did you mean X?)", in this program's tone. */
function suggestionIn(message: string): string | undefined {
  const words = /\(Did you mean (?:one of )?([^)]*)\?\)/.exec(message)?.[1];
  return words === undefined ? undefined : `did you mean ${words}?`;
}
