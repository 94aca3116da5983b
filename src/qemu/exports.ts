// Exports of QEMU's own NBD server, which it has one of. Main thread.

import { CowcatcherError } from "../errors.js";
import type { Visit } from "./monitor.js";
import { removing, type UndoStack } from "./undo.js";

/** Of an export that QEMU is told to delete: what is in flight is given up. */
const EXPORT_DELETED_MS = 30_000;

export interface NewExport {
  id: string;
  node: string;
  writable: boolean;
  /** By name, of the node; or of another one. */
  bitmaps?: readonly (string | { node: string; name: string })[] | undefined;
}

/** @throws CowcatcherError: undo is the caller's */
export async function addExport(
  visit: Visit,
  undo: UndoStack,
  { id, node, writable, bitmaps }: NewExport,
): Promise<void> {
  undo.push(`delete export ${id}`, (later) => deleteExport(later, id));
  const args = { type: "nbd", id, "node-name": node, name: id, writable, bitmaps };
  await visit.execute("block-export-add", args);
}

/** Deletes an export whatever its clients do, and waits until it is gone. @throws CowcatcherError */
export async function deleteExport(visit: Visit, id: string): Promise<void> {
  await removing(visit.execute("block-export-del", { id, mode: "hard" }));
  await visit.until(
    `export ${id} is to go`,
    async () => !(await visit.list("query-block-exports")).some((found) => found["id"] === id),
    EXPORT_DELETED_MS,
  );
}

/**
 * Has QEMU serve NBD at `socket`, which only this run uses.
 * @throws CowcatcherError BUSY where its server runs already: QEMU has one, and does not say where it listens
 */
export async function startServer(visit: Visit, socket: string, undo: UndoStack): Promise<void> {
  try {
    await visit.execute("nbd-server-start", { addr: { type: "unix", data: { path: socket } } });
  } catch (error) {
    if (error instanceof CowcatcherError && /already running/.test(error.message))
      throw serverRuns(visit.path, error);
    throw error;
  }
  undo.pushCommand("stop QEMU's NBD server", "nbd-server-stop");
}

function serverRuns(object: string, cause: CowcatcherError): CowcatcherError {
  return new CowcatcherError({
    code: "BUSY",
    object,
    problem: "QEMU's NBD server runs already, and QEMU does not say where it listens",
    hint: "give its address with --nbd, such as --nbd /run/vm1-nbd.sock or --nbd 127.0.0.1:10809",
    cause,
  });
}
