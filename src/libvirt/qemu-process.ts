// The process that runs a domain. libvirt has QEMU make the socket that we read from, and makes the files for old data as
// QEMU's user: both stand in a folder that is that user's alone. Who it is libvirt does not say in all its set-ups (it is in its
// configuration, or in no place at all where libvirt runs as a user's own), so the process itself is looked at. Where there is
// none the domain runs on another machine, whose sockets and files this process has no part in.

import { readdirSync, readFileSync } from "node:fs";
import { CowcatcherError } from "../errors.js";
import type { Owner } from "../qemu/run-folder.js";
import type { Domain } from "./domain.js";

/**
 * Whose QEMU it is; undefined: this process's own user. Synchronous.
 * @throws CowcatcherError UNSUPPORTED where it is not on this machine, or where files cannot be given to its user
 */
export function qemuUser({ name, uuid }: Domain, processes = "/proc"): Owner | undefined {
  const found = findProcess(uuid, processes);
  if (found === undefined) {
    throw new CowcatcherError({
      code: "UNSUPPORTED",
      object: name,
      problem: "its QEMU does not run on this machine, or is not to be seen from here",
      hint: "run cowcatcher on the machine, and in the container, where the guest runs",
    });
  }
  const self = process.getuid?.();
  if (found.uid === self) return undefined;
  if (self === 0) return found;
  throw new CowcatcherError({
    code: "UNSUPPORTED",
    object: name,
    problem: `its QEMU runs as the user ${found.uid}, to whom this process cannot give a folder`,
    hint: "run cowcatcher as root",
  });
}

/** libvirt starts each QEMU with the domain's UUID. */
function findProcess(uuid: string, processes: string): Owner | undefined {
  for (const pid of readdirSync(processes)) {
    if (!/^\d+$/.test(pid)) continue;
    try {
      const words = readFileSync(`${processes}/${pid}/cmdline`, "latin1").split("\0");
      const at = words.indexOf("-uuid");
      if (at < 0 || words[at + 1] !== uuid) continue;
      const status = readFileSync(`${processes}/${pid}/status`, "latin1");
      return { uid: idOf("Uid", status), gid: idOf("Gid", status) };
    } catch {
      // It has ended meanwhile, or is not to be looked at.
    }
  }
  return undefined;
}

/** Of real, effective, saved and file system id, by which files are opened: proc(5). */
function idOf(name: "Uid" | "Gid", status: string): number {
  const [, id] = new RegExp(`^${name}:(?:\\s+\\d+){3}\\s+(\\d+)$`, "m").exec(status) ?? [];
  return Number(id);
}
