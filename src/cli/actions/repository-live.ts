// `backup --control --repo`: disks that a server has open, as one backup in a repository. The server writes it.
import { repositoryTargetName } from "../../control/repository-arguments.js";
import type { RepositoryLiveSettings } from "../options/repository-backup.js";
import { diskNameOf } from "../../run/disk-name.js";
import type { CommandContext } from "../output/context.js";
import { NO_BACKUP, printRepositoryResult } from "../progress/repository-summary.js";
import { type JobEnd, runLiveJobs } from "./live-backup.js";

/** Resolves to the exit code. @throws CowcatcherError, which the program reports. */
export function runRepositoryLive(
  settings: RepositoryLiveSettings,
  context: CommandContext,
): Promise<number> {
  const { control, disks, job, place, guestAgent } = settings;
  return runLiveJobs(control, context, {
    guestAgent,
    disks: (served) =>
      (disks.length > 0 ? disks : [...served.keys()]).map((disk) => {
        const repository = { ...place, disk: nameInBackup(disk) };
        return { disk, job: { ...job, target: repositoryTargetName(repository), repository } };
      }),
    print: (ends) => print(ends, `${place.address}::${place.group}`, context),
    remains: NO_BACKUP,
  });
}

/** A node may be called what a disk may not. */
export function nameInBackup(disk: string): string {
  return /^[A-Za-z0-9][A-Za-z0-9._+-]{0,99}$/.test(disk) ? disk : diskNameOf(disk);
}

function print(ends: readonly JobEnd[], target: string, context: CommandContext): void {
  const outcomes = ends.flatMap(({ repository }) => (repository === undefined ? [] : [repository]));
  const [first] = outcomes;
  // The first disk that is full makes the backup a full one, and says why.
  const bases = ends.flatMap(({ result: { basis } }) => (basis === undefined ? [] : [basis]));
  const basis = bases.find(({ level }) => level === "full") ?? bases[0];
  printRepositoryResult(
    {
      group: first?.group ?? "",
      time: first?.time ?? "",
      level: basis?.level ?? "full",
      reason: basis?.reason ?? "",
      clockBehind: first?.clockBehind,
      freeze: ends[0]?.info.freeze,
      disks: ends.map(({ info, result: { progress }, repository }) => ({
        disk: repository?.disk ?? info.disk,
        sizeBytes: info.totalBytes,
        newChunks: repository?.newChunks ?? 0,
        newBytes: repository?.newBytes ?? 0,
        readBytes: repository?.readBytes ?? 0,
        ignoredErrors: progress.ignoredErrorCount,
        guest: progress,
      })),
    },
    target,
    Math.max(0, ...ends.map(({ result }) => result.progress.elapsedMs)),
    context,
  );
}
