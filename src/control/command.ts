// What a command is, and what its handler may use.

import type { Logger } from "../log.js";
import type { JobHost } from "../backup/host.js";
import type { JobOptions } from "../backup/options.js";
import type { ExportHost } from "./export-host.js";
import type { TargetNodes } from "./target-nodes.js";
import type { JobMonitor } from "./job-monitor.js";
import { checkMembers } from "../qmp/schema.js";
import type { Arguments, Members } from "../qmp/schema.js";
import type { JsonObject } from "../qmp/protocol.js";

export interface CommandContext {
  readonly host: JobHost;
  readonly monitor: JobMonitor;
  readonly targets: TargetNodes;
  /** Undefined where nothing can be exported at run time. */
  readonly exports: ExportHost | undefined;
  /** What the server was started with for its jobs, over JOB_DEFAULTS. */
  readonly jobDefaults: Partial<JobOptions>;
  readonly version: string;
  readonly logger: Pick<Logger, "debug" | "info" | "warn">;
}

export interface Command {
  /** @throws QmpError for arguments that do not fit; CowcatcherError for what went wrong. */
  execute(args: JsonObject, context: CommandContext): unknown;
}

export function command<M extends Members>(
  schema: M,
  run: (args: Arguments<M>, context: CommandContext) => unknown,
): Command {
  return { execute: (args, context) => run(checkMembers(args, schema), context) };
}
