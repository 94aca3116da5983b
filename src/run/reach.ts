// Whether a folder's storage answers at all. Storage that is gone (NFS without its server, a frozen file system) holds whoever
// asks it for anything in the kernel, where no signal ends it; and a thread of this process that is held there is one of the
// four that all its other files wait for. So another process goes first, and is left behind where it does not come back.
//
// It makes the folder and sets its time of change: both take the way of a write. What it is refused it says nothing of: whoever comes
// next is refused, too, and says why.
import { spawn } from "node:child_process";
import { CowcatcherError } from "../errors.js";
import { endGroup } from "./child.js";

/** Disks that have to spin up, and NFS servers that change places, are slower than any that is well. */
export const REACH_MS = 60_000;

const MAKE = 'umask 077; mkdir -p -- "$1" && touch -c -- "$1"';
const LOOK = 'stat -f -- "$1"';

export interface ReachRequest {
  /** The folder is made where it is missing, and written to; else it is looked at. */
  makes: boolean;
  timeoutMs?: number | undefined;
  /** The shell's words, in tests. */
  script?: string | undefined;
}

/** @throws CowcatcherError IO (ETIMEDOUT) where there is no answer in time */
export async function reachFolder(
  folder: string,
  { makes, timeoutMs = REACH_MS, script = makes ? MAKE : LOOK }: ReachRequest,
): Promise<void> {
  const child = spawn("sh", ["-c", script, "sh", folder], { stdio: "ignore", detached: true });
  const isBack = await new Promise<boolean>((settle) => {
    const timer = setTimeout(() => settle(false), timeoutMs);
    const back = (): void => {
      clearTimeout(timer);
      settle(true);
    };
    // Where there is no shell, nobody goes first.
    child.on("error", back).on("exit", back);
  });
  if (isBack) return;
  // The shell and what it runs; what the kernel holds goes when the storage answers.
  endGroup(child.pid, "SIGKILL");
  child.unref();
  throw new CowcatcherError({
    code: "IO",
    object: folder,
    problem: `its storage has not answered within ${timeoutMs / 1000} s`,
    hint: "see to the mount and to what it is mounted from",
    errno: "ETIMEDOUT",
  });
}
