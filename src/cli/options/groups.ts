// A group's number by its name, which Node does not tell.
import { execFileSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { usageError } from "./options.js";

/** @throws CowcatcherError USAGE, naming `option`, for a group that there is not. */
export function groupIdOf(group: string, option: string): number {
  if (/^\d{1,10}$/.test(group)) return Number(group);
  const entry = entryByService(group) ?? entryInFile(group);
  const id = entry?.split(":")[2];
  if (id === undefined) throw usageError(option, `there is no group '${group}'`);
  return Number(id);
}

/** Knows what the system's name service does, such as a directory server. */
function entryByService(group: string): string | undefined {
  try {
    const stdio: ["ignore", "pipe", "ignore"] = ["ignore", "pipe", "ignore"];
    return execFileSync("getent", ["--", "group", group], { encoding: "utf8", timeout: 10_000, stdio });
  } catch {
    return undefined;
  }
}

function entryInFile(group: string): string | undefined {
  try {
    const lines = readFileSync("/etc/group", "utf8").split("\n");
    return lines.find((line) => line.startsWith(`${group}:`));
  } catch {
    return undefined;
  }
}
