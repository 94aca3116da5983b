// `checkpoints`: what a server remembers to have changed since when, over the control socket.
import { isJsonObject } from "../../qmp/protocol.js";
import { ControlClient } from "../../qmp/client.js";
import { formatBytes } from "../../units.js";
import { parseChoice, usageError } from "../options/options.js";
import { type CommandContext, printJsonDocument, printLine } from "../output/context.js";
import { EXIT } from "../output/exit-codes.js";
import { alignColumns } from "../output/columns.js";

export type CheckpointsRequest =
  { action: "list" } | { action: "delete"; name: string; disk: string | undefined };

/** An entry of the list that `checkpoints --json` prints. */
export interface CheckpointDocument {
  disk: string;
  name: string;
  /** The same for all disks of one backup. */
  uuid: string;
  /** The instant that it stands for: RFC 3339, UTC. */
  t0: string;
  changed_bytes: number;
}

/** @throws CowcatcherError USAGE */
export function parseCheckpointsRequest(
  action: string | undefined,
  name: string | undefined,
  disk: string | undefined,
): CheckpointsRequest {
  if (action === undefined) {
    if (disk !== undefined) throw usageError("--disk", "goes with delete alone", "leave it out");
    return { action: "list" };
  }
  parseChoice(action, "checkpoints", ["delete"] as const);
  if (name === undefined) throw usageError("NAME", "is missing", "cowcatcher checkpoints lists them");
  return { action: "delete", name, disk };
}

export async function runCheckpoints(
  request: CheckpointsRequest,
  control: string,
  { output }: CommandContext,
): Promise<number> {
  const client = await ControlClient.connect(control);
  try {
    if (request.action === "delete") {
      await client.execute("x-checkpoint-delete", { name: request.name, device: request.disk });
      if (!output.json) return EXIT.done;
    }
    const answer = await client.execute("x-query-checkpoints");
    const list = (Array.isArray(answer) ? answer : []).filter(isJsonObject).map(readCheckpoint);
    if (output.json) printJsonDocument(output, list);
    else for (const line of checkpointLines(list)) printLine(output, line);
  } finally {
    client.close();
  }
  return EXIT.done;
}

function readCheckpoint(wire: Record<string, unknown>): CheckpointDocument {
  const text = (value: unknown): string => (typeof value === "string" ? value : "");
  const number = (value: unknown): number => (typeof value === "number" ? value : 0);
  return {
    disk: text(wire["disk"]),
    name: text(wire["name"]),
    uuid: text(wire["uuid"]),
    t0: new Date(number(wire["created-ms"])).toISOString(),
    changed_bytes: number(wire["changed-bytes"]),
  };
}

function checkpointLines(list: readonly CheckpointDocument[]): string[] {
  const rows = list.map(({ disk, name, t0, changed_bytes }) => [disk, name, t0, formatBytes(changed_bytes)]);
  return alignColumns([["DISK", "CHECKPOINT", "T0", "CHANGED SINCE"], ...rows]);
}
