// Imported for its effect, before anything that takes functions from node:fs.
import { watchProcess } from "./sandbox.js";

watchProcess();
