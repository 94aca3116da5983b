import { runOfflineCopy } from "./backup.js";
import type { RunRestore } from "./context.js";

export const runRestore: RunRestore = (settings, context) => runOfflineCopy(settings, context);
