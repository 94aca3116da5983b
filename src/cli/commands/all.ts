// The commands. Each has its definition in a file of this folder: arguments, options, help. What it does is in a module
// of its own (actions/), loaded when it is run, so that `--help` and `serve` start without the engines that they do not
// need.
import type { Command } from "commander";
import type { Environment } from "../output/context.js";
import type { CommandName } from "../output/exit-codes.js";
import { addBackup } from "./backup.js";
import { addBench } from "./bench.js";
import { addCheck } from "./check.js";
import { addCheckpoints } from "./checkpoints.js";
import { addCompare } from "./compare.js";
import { addCreate } from "./create.js";
import { addCat, addCp, addLs } from "./files.js";
import { addInfo } from "./info.js";
import { addJobs } from "./jobs.js";
import { addMap } from "./map.js";
import { addMount } from "./mount.js";
import { addRestore } from "./restore.js";
import { addRepo } from "./repo.js";
import { addRun } from "./run.js";
import { addServe } from "./serve.js";
import type { RunCommand } from "./definition.js";

const ADD_COMMAND: Record<
  CommandName,
  (program: Command, run: RunCommand, environment: Environment) => void
> = {
  backup: addBackup,
  serve: addServe,
  jobs: addJobs,
  checkpoints: addCheckpoints,
  restore: addRestore,
  info: addInfo,
  map: addMap,
  check: addCheck,
  compare: addCompare,
  create: addCreate,
  repo: addRepo,
  mount: addMount,
  ls: addLs,
  cat: addCat,
  cp: addCp,
  run: addRun,
  bench: addBench,
};

/** @param only the one that is asked for: to build what all of them take costs a start more than to run it */
export function addCommands(
  program: Command,
  run: RunCommand,
  environment: Environment,
  only?: CommandName,
): void {
  if (only !== undefined) return ADD_COMMAND[only](program, run, environment);
  for (const add of Object.values(ADD_COMMAND)) add(program, run, environment);
}
