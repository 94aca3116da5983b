import type { KeySource } from "../../repository/format/keys.js";
import type { RestoreSettings } from "../options/backup-options.js";
import type { CommandContext } from "../output/context.js";
import { runOfflineCopy } from "./backup.js";

/** Resolves to the exit code. @throws CowcatcherError, which the program reports. */
export function runRestore(
  settings: RestoreSettings,
  repositoryKey: () => Promise<KeySource | undefined>,
  context: CommandContext,
): Promise<number> {
  return runOfflineCopy(settings, context, repositoryKey);
}
