import type { RunServe } from "./context.js";
import { unsupported } from "./options.js";

export const runServe: RunServe = () => Promise.reject(unsupported("serve", "is not in this version"));
