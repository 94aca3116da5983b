// The commands. Each has its definition in a file of this folder: arguments, options, help. What it does is in a module
// of its own (actions/), loaded when it is run, so that `--help` and `serve` start without the engines that they do not
// need; nor do they load each other's definitions.
import type { Command } from "commander";
import type { Environment } from "../output/context.js";
import type { CommandName } from "../output/exit-codes.js";
import type { RunCommand } from "./definition.js";

type AddCommand = (program: Command, run: RunCommand, environment: Environment) => void;

const ADD_COMMAND: Record<CommandName, () => Promise<AddCommand>> = {
  backup: async () => (await import("./backup.js")).addBackup,
  serve: async () => (await import("./serve.js")).addServe,
  jobs: async () => (await import("./jobs.js")).addJobs,
  checkpoints: async () => (await import("./checkpoints.js")).addCheckpoints,
  restore: async () => (await import("./restore.js")).addRestore,
  info: async () => (await import("./info.js")).addInfo,
  map: async () => (await import("./map.js")).addMap,
  check: async () => (await import("./check.js")).addCheck,
  compare: async () => (await import("./compare.js")).addCompare,
  create: async () => (await import("./create.js")).addCreate,
  repo: async () => (await import("./repo.js")).addRepo,
  mount: async () => (await import("./mount.js")).addMount,
  ls: async () => (await import("./files.js")).addLs,
  cat: async () => (await import("./files.js")).addCat,
  cp: async () => (await import("./files.js")).addCp,
  run: async () => (await import("./run.js")).addRun,
  bench: async () => (await import("./bench.js")).addBench,
};

/** @param only the one that is asked for: to load and build what all of them take costs a start more than to run it */
export async function addCommands(
  program: Command,
  run: RunCommand,
  environment: Environment,
  only?: CommandName,
): Promise<void> {
  const asked = only === undefined ? Object.values(ADD_COMMAND) : [ADD_COMMAND[only]];
  for (const load of asked) (await load())(program, run, environment);
}
