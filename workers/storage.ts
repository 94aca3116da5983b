// A storage thread: carries out what the main thread must not do itself, since it serves guests. Each call blocks this
// thread for as long as its storage takes; see src/backup/storage/thread.ts.

import { parentPort } from "node:worker_threads";
import { bootIsOver } from "../src/backup/copy/thread-boots.js";
import { StorageOperations } from "../src/backup/storage/operations.js";
import type { AnswerMessage, CallMessage } from "../src/backup/storage/protocol.js";
import { toCowcatcherError } from "../src/errors.js";

bootIsOver();

const operations = new StorageOperations();

async function carryOut({ id, call, argument }: CallMessage): Promise<AnswerMessage> {
  try {
    // The argument is the call's own: StorageHand.call has seen to that.
    return { id, result: await operations[call](argument as never) };
  } catch (error) {
    const typed = toCowcatcherError(error, "storage");
    return { id, error: typed.toDetails(), stack: typed.stack };
  }
}

parentPort?.on("message", (message: CallMessage) => {
  void carryOut(message).then((answer) => parentPort?.postMessage(answer));
});
