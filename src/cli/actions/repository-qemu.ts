// `backup --repo` with --qmp or --libvirt: disks of a guest that QEMU runs, as one backup in a repository, written by this process.
import { JOB_DEFAULTS } from "../../backup/options.js";
import { GuestSession } from "../../qemu/repository.js";
import { Repository } from "../../repository/repository.js";
import type { RepositoryQemuSettings } from "../options/repository-backup.js";
import type { CommandContext } from "../output/context.js";
import { NO_BACKUP, printRepositoryResult } from "../progress/repository-summary.js";
import { packageVersion } from "../version.js";
import { type QemuEnd, runQemuJobs } from "./backup-qemu.js";
import { nameInBackup } from "./repository-live.js";

/** Resolves to the exit code. @throws CowcatcherError, which the program reports. */
export async function runRepositoryQemu(
  settings: RepositoryQemuSettings,
  context: CommandContext,
): Promise<number> {
  const repository = await Repository.open(settings.repository, settings.key);
  const backup = new GuestSession(repository, {
    ...settings,
    tool: `cowcatcher ${packageVersion()}`,
    nameOf: nameInBackup,
  });
  const name = `${settings.repository}::${settings.group}`;
  try {
    return await runQemuJobs(settings.guest, context, {
      allDisks: settings.guest.disks.length > 0 ? undefined : withBuffer(settings),
      makeTargets: (disks) => backup.makeDisks(disks),
      onT0: (t0Ms) => backup.started(t0Ms),
      targetName: (disk) => `${name}/${nameInBackup(disk)}`,
      print: (ends) => print(backup, ends, name, context),
      remains: NO_BACKUP,
    });
  } finally {
    await backup.end(name);
    repository.close();
  }
}

function withBuffer({ job }: RepositoryQemuSettings) {
  return { ...job, cowBufferSizeBytes: job.cowBufferSizeBytes ?? JOB_DEFAULTS.cowBufferSizeBytes };
}

function print(
  { session, level, disks }: GuestSession,
  ends: readonly QemuEnd[],
  target: string,
  context: CommandContext,
): void {
  if (session === undefined) return;
  printRepositoryResult(
    {
      ...session.backup,
      ...level,
      clockBehind: session.clockBehind,
      disks: disks.map((disk, index) => ({
        disk: disk.name,
        sizeBytes: disk.sizeBytes,
        ...disk.counts,
        ignoredErrors: ends[index]?.progress.ignoredErrorCount ?? 0,
        guest: ends[index]?.progress,
      })),
      qemu: ends[0]?.info.qemu,
      freeze: ends[0]?.info.freeze,
    },
    target,
    Math.max(0, ...ends.map(({ progress }) => progress.elapsedMs)),
    context,
  );
}
