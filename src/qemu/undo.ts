// What has been done to somebody else's QEMU, and how each of it is undone: last first, every step whatever became of the
// one before. A step is noted before its command goes out, as a command whose answer was lost may have worked.

import { messageOf } from "../errors.js";
import { QmpError, type JsonObject } from "../qmp/protocol.js";
import type { Visit } from "./monitor.js";

export interface UndoStep {
  /** For whoever has to do it by hand. */
  what: string;
  undo: (visit: Visit) => Promise<void>;
}

export class UndoStack {
  readonly #steps: UndoStep[] = [];

  push(what: string, undo: UndoStep["undo"]): void {
    this.#steps.push({ what, undo });
  }

  /** A step that is undone by one command. */
  pushCommand(what: string, command: string, args: JsonObject = {}): void {
    this.push(what, (visit) => removing(visit.execute(command, args)));
  }

  get isEmpty(): boolean {
    return this.#steps.length === 0;
  }

  /** Undoes everything; what could not be undone, as lines. May be called again: then nothing is left. */
  async run(visit: Visit): Promise<string[]> {
    const failures: string[] = [];
    for (let step = this.#steps.pop(); step !== undefined; step = this.#steps.pop()) {
      try {
        await step.undo(visit);
      } catch (error) {
        failures.push(`${step.what}: ${messageOf(error)}`);
      }
    }
    return failures;
  }
}

/** Runs a command that removes something: that it is gone already is as good. */
export async function removing(command: Promise<unknown>): Promise<void> {
  try {
    await command;
  } catch (error) {
    if (!(error instanceof QmpError) || !isMissing(error.desc)) throw error;
  }
}

/** QEMU's words for what it does not have (blockdev.c, block/export/export.c, blockdev-nbd.c, job-qmp.c). */
function isMissing(desc: string): boolean {
  return /not found|Failed to find node|Cannot find|is not found|not running|Job not found/i.test(desc);
}
