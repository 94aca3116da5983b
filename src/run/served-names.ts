// The disks that a server has, for a job that names none.
import { CowcatcherError } from "../errors.js";
import { ControlClient } from "../qmp/client.js";
import { isJsonObject } from "../qmp/protocol.js";
import type { JobSource } from "./job.js";

/** Undefined where the source names its disks, or `backup` finds the only one. @throws CowcatcherError IO, NOT_FOUND */
export async function diskNames(source: JobSource): Promise<string[] | undefined> {
  if (source.kind !== "control" || source.disks !== undefined) return undefined;
  const client = await ControlClient.connect(source.socket);
  try {
    const answer = await client.execute("query-named-block-nodes");
    const names = (Array.isArray(answer) ? answer : [])
      .filter(isJsonObject)
      .flatMap(({ "node-name": name }) => (typeof name === "string" ? [name] : []));
    if (names.length > 0) return names;
    throw new CowcatcherError({
      code: "NOT_FOUND",
      object: source.socket,
      problem: "the server has no disk",
    });
  } finally {
    client.close();
  }
}
