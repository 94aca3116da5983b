// A domain's backup job: libvirt has one job a domain, whoever began it, and ends it by `domjobabort`, whoever's it is. So
// it is looked at first whether it is ours, by the socket that it serves: that stands in our run's folder, whose name says
// which process the run is.

import { writeFile } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { CowcatcherError, ioError } from "../errors.js";
import { runOf } from "../qemu/names.js";
import type { RunFolder } from "../qemu/run-folder.js";
import { type CheckpointDocument, type BackupDocument, backupXml, checkpointXml } from "./documents.js";
import { type Virsh, VirshError } from "./virsh.js";
import { childOf, parseXml } from "./xml.js";

/** A job that is told to end has to finish what it has in flight. */
const END_MS = 60_000;
const LOOK_MS = 100;

/** The socket that the domain's backup job serves; undefined: it has none. @throws CowcatcherError as Virsh.run; PROTOCOL */
export async function socketOfJob(virsh: Virsh): Promise<string | undefined> {
  let text: string;
  try {
    text = await virsh.run("backup-dumpxml");
  } catch (error) {
    if (error instanceof VirshError && isGone(error)) return undefined;
    throw error;
  }
  return childOf(parseXml(text, virsh.domain), "server")?.attributes.get("socket") ?? "";
}

function isGone({ code, complaint }: VirshError): boolean {
  return code === "NOT_FOUND" || /no domain backup job present|domain is not running/i.test(complaint);
}

/** The run whose backup job the domain has; undefined: none of ours. @throws as socketOfJob */
export async function runOfJob(
  virsh: Virsh,
): Promise<{ run: string; folder: string; socket: string } | undefined> {
  const socket = await socketOfJob(virsh);
  if (socket === undefined) return undefined;
  const folder = dirname(socket);
  const run = runOf(basename(folder));
  return run === undefined || run !== basename(folder) ? undefined : { run, folder, socket };
}

/** @throws CowcatcherError BUSY, naming what the domain is at */
export async function refuseBusy(virsh: Virsh): Promise<void> {
  const answer = await virsh.run("domjobinfo");
  const type = /^Job type:\s+(.*?)\s*$/m.exec(answer)?.[1];
  if (type === undefined || type === "None") return;
  const operation = /^Operation:\s+(.*?)\s*$/m.exec(answer)?.[1] ?? type;
  const ours = await runOfJob(virsh);
  throw new CowcatcherError({
    code: "BUSY",
    object: virsh.domain,
    problem:
      ours === undefined
        ? `it has a job already (${operation}), and libvirt does one at a time`
        : "another backup of this domain is running",
    hint: "wait for its end",
  });
}

/** Ends the job that serves `socket`, and no other. @throws CowcatcherError as Virsh.run; BUSY where it does not end */
export async function endJob(virsh: Virsh, socket: string): Promise<void> {
  const isThere = async () => (await socketOfJob(virsh)) === socket;
  if (!(await isThere())) return;
  try {
    await virsh.run("domjobabort");
  } catch (error) {
    if (await isThere()) throw error;
  }
  const deadline = performance.now() + END_MS;
  while (await isThere()) {
    if (performance.now() > deadline) {
      const problem = `libvirt's backup job has not ended within ${END_MS / 1000} s`;
      throw new CowcatcherError({ code: "BUSY", object: virsh.domain, problem, hint: "virsh domjobinfo" });
    }
    await delay(LOOK_MS);
  }
}

export interface JobDocuments {
  backup: BackupDocument;
  checkpoint: CheckpointDocument | undefined;
}

/**
 * Begins the job: T0 of all its disks, and of the checkpoint.
 * @throws CowcatcherError as Virsh.run: whether it has begun is not known then, and ending it the caller's
 */
export async function beginJob(virsh: Virsh, folder: RunFolder, documents: JobDocuments): Promise<void> {
  const backup = await writeDocument(folder, "backup.xml", backupXml(documents.backup));
  const checkpoint =
    documents.checkpoint &&
    (await writeDocument(folder, "checkpoint.xml", checkpointXml(documents.checkpoint)));
  const options = [`--backupxml=${backup}`];
  if (checkpoint !== undefined) options.push(`--checkpointxml=${checkpoint}`);
  await virsh.run("backup-begin", ...options);
}

/** For virsh to read; its name in the run's folder. */
async function writeDocument(folder: RunFolder, name: string, text: string): Promise<string> {
  const path = join(folder.path, name);
  try {
    await writeFile(path, text, { mode: 0o600 });
  } catch (error) {
    throw ioError("write what virsh is to read", path, error);
  }
  return path;
}

/** Why the last job ended, in libvirt's words; undefined: it does not say. Never rejects. */
export async function endOfLastJob(virsh: Virsh): Promise<string | undefined> {
  const answer = await virsh.run("domjobinfo", "--completed", "--keep-completed").catch(() => "");
  return /^Error message:\s+(.*?)\s*$/m.exec(answer)?.[1];
}
