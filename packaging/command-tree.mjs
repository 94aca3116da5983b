// The commands of cowcatcher as data, from commander's own tree, for manual pages and completions. Needs a build.
import { Command } from "commander";
import { addCommands } from "../dist/src/cli/commands/all.js";
import { JOB_MEMBERS } from "../dist/src/run/file/job-shape.js";
import { packageVersion } from "../dist/src/cli/version.js";

/**
 * @typedef {{ short: string | undefined, long: string | undefined, value: string | undefined, isOptional: boolean,
 *   flags: string, help: string }} Option
 * @typedef {{ name: string, summary: string, usages: string[], options: Option[], notes: string, commands: Words[] }} Words
 */

export const version = packageVersion();
export const jobMembers = JOB_MEMBERS;

/** @returns {Promise<Words[]>} */
export async function readCommands() {
  const program = new Command("cowcatcher");
  await addCommands(program, () => Promise.resolve(), {});
  return program.commands.map((command) => words(command, `cowcatcher ${command.name()}`));
}

/** @returns {Words} */
function words(command, path) {
  return {
    name: command.name(),
    summary: command.summary(),
    usages: command
      .usage()
      .split("\n")
      .map((line, index) => (index === 0 ? `${path} ${line}` : line.trim())),
    options: [...command.options.map(option), HELP],
    notes: notesOf(command),
    commands: command.commands.map((one) => words(one, `${path} ${one.name()}`)),
  };
}

const HELP = {
  ...{ short: "-h", long: "--help", value: undefined, isOptional: false },
  ...{ flags: "-h, --help", help: "print the command's help" },
};

function option({ short, long, flags, description, required, optional }) {
  const value = /[<[]([^>\]]+)[>\]]/.exec(flags)?.[1];
  return {
    short,
    long,
    value: required || optional ? value : undefined,
    isOptional: optional,
    flags,
    help: description,
  };
}

/** What --help has behind the options. */
function notesOf(command) {
  let text = "";
  command.configureOutput({ writeOut: (more) => (text += more) });
  command.outputHelp();
  return text.slice(command.helpInformation().length).trim();
}
