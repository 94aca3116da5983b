// The keeper of an RBD image: answers one request after another (src/rbd/keeper-thread.ts).

import { parentPort } from "node:worker_threads";
import { Keeper } from "../src/rbd/keeper-thread.js";
import type { KeeperRequest } from "../src/rbd/keeper-protocol.js";

const keeper = new Keeper();
parentPort?.on("message", (request: KeeperRequest) => parentPort?.postMessage(keeper.handle(request)));
