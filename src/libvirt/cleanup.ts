// What runs that died have left in a domain: libvirt's backup job, and a checkpoint. Found by the names of our runs and by
// who is still alive; nothing else is touched. Main thread.

import { rm } from "node:fs/promises";
import { bitmapsOfFiles } from "../qemu/bitmaps.js";
import { isAlive } from "../qemu/names.js";
import { removeDeadFolders } from "../qemu/run-folder.js";
import { checkpointsOfFiles, deadCheckpoints, deleteCheckpoint, isComplete } from "./checkpoints.js";
import { endJob, runOfJob } from "./job.js";
import { Virsh } from "./virsh.js";

/**
 * Ends the backup job of a dead run, and gives up the checkpoint that it made: the one before it has recorded everything.
 * Names of what was removed.
 * @throws CowcatcherError as Virsh.run
 */
export async function cleanUpDead(virsh: Virsh): Promise<string[]> {
  const job = await runOfJob(virsh);
  if (job === undefined || isAlive(job.run)) return [];
  await endJob(virsh, job.socket);
  const removed = [`job ${job.run}`];
  for (const { name, origin } of await deadCheckpoints(virsh)) {
    if (origin.run !== job.run) continue;
    await deleteCheckpoint(virsh, name);
    removed.push(name);
  }
  await rm(job.folder, { recursive: true, force: true }).catch(() => undefined);
  return removed;
}

/**
 * As cleanUpDead; and the checkpoints of dead runs whose backups are not there, as nothing can build on them; and dead runs'
 * folders in `directory`; and the checkpoints of the backups `replaced`, on which nothing will be built.
 * @throws CowcatcherError as cleanUpDead
 */
export async function cleanUpDomain(
  { connect, domain }: { connect: string | undefined; domain: string },
  directory: string,
  replaced: readonly string[] = [],
): Promise<string[]> {
  const virsh = new Virsh(connect, domain);
  const removed = await cleanUpDead(virsh);
  const abandoned = (await deadCheckpoints(virsh)).filter(({ name, origin }) => !isComplete(name, origin));
  const given = bitmapsOfFiles(replaced);
  const ended = given.size === 0 ? [] : await checkpointsOfFiles(virsh, (bitmap) => given.has(bitmap));
  for (const name of [...abandoned.map((one) => one.name), ...ended]) {
    await deleteCheckpoint(virsh, name);
    removed.push(name);
  }
  await removeDeadFolders(directory);
  return removed;
}
