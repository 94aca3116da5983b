// `backup --repo` with --qmp or --libvirt: disks of a guest that QEMU runs, as one backup in a repository, written by this process.
import { decideLevel } from "../../backup/job/repository-backup.js";
import { JOB_DEFAULTS } from "../../backup/options.js";
import { CowcatcherError } from "../../errors.js";
import type { FoundDisk } from "../../qemu/backup.js";
import { BackupSession, type SessionDisk } from "../../repository/backup/session.js";
import { Repository } from "../../repository/repository.js";
import { RepositoryTarget } from "../../target/repository/target.js";
import type { Target } from "../../target/target.js";
import type { RepositoryQemuSettings } from "../options/repository-backup.js";
import type { CommandContext } from "../output/context.js";
import { NO_BACKUP, printRepositoryResult } from "../progress/repository-summary.js";
import { packageVersion } from "../version.js";
import { type QemuEnd, runQemuJobs } from "./backup-qemu.js";
import { nameInBackup } from "./repository-live.js";

const NS_PER_MS = 1_000_000n;

/** Resolves to the exit code. @throws CowcatcherError, which the program reports. */
export async function runRepositoryQemu(
  settings: RepositoryQemuSettings,
  context: CommandContext,
): Promise<number> {
  const repository = await Repository.open(settings.repository, settings.key);
  const backup = new QemuRepositoryBackup(settings, repository, context);
  try {
    return await runQemuJobs(settings.guest, context, {
      allDisks: settings.guest.disks.length > 0 ? undefined : withBuffer(settings),
      makeTargets: (disks) => backup.makeTargets(disks),
      onT0: (t0Ms) => backup.started(t0Ms),
      targetName: (disk) => `${backup.name}/${nameInBackup(disk)}`,
      print: (ends) => backup.print(ends),
      remains: NO_BACKUP,
    });
  } finally {
    await backup.end();
    repository.close();
  }
}

function withBuffer({ job }: RepositoryQemuSettings) {
  return { ...job, cowBufferSizeBytes: job.cowBufferSizeBytes ?? JOB_DEFAULTS.cowBufferSizeBytes };
}

class QemuRepositoryBackup {
  readonly name: string;
  readonly #settings: RepositoryQemuSettings;
  readonly #repository: Repository;
  readonly #context: CommandContext;
  #session: BackupSession | undefined;
  readonly #disks: SessionDisk[] = [];
  #level: Pick<ReturnType<typeof decideLevel>, "level" | "reason"> = { level: "full", reason: "" };

  constructor(settings: RepositoryQemuSettings, repository: Repository, context: CommandContext) {
    this.#settings = settings;
    this.#repository = repository;
    this.#context = context;
    this.name = `${settings.repository}::${settings.group}`;
  }

  /** @throws CowcatcherError as BackupSession.begin and addDisk; NO_BASIS */
  async makeTargets(disks: readonly FoundDisk[]): Promise<readonly Target[]> {
    const { group, vmConfig, level } = this.#settings;
    const session = await BackupSession.begin(this.#repository, {
      group,
      vmConfig,
      diskCount: disks.length,
      totalBytes: disks.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0),
      tool: `cowcatcher ${packageVersion()}`,
    });
    this.#session = session;
    return disks.map(({ name, sizeBytes, format }) => {
      const disk = session.addDisk(nameInBackup(name), sizeBytes, format);
      const decided = decideLevel(level, session, disk, { sizeBytes }, undefined);
      session.setLevel(decided.level, decided.reason);
      this.#level = decided;
      this.#disks.push(disk);
      return new RepositoryTarget(disk, "side-by-side");
    });
  }

  started(t0Ms: number): void {
    this.#session?.started(BigInt(Math.round(t0Ms)) * NS_PER_MS);
  }

  print(ends: readonly QemuEnd[]): void {
    const session = this.#session;
    if (session === undefined) return;
    printRepositoryResult(
      {
        ...session.backup,
        ...this.#level,
        clockBehind: session.clockBehind,
        disks: this.#disks.map((disk, index) => ({
          disk: disk.name,
          sizeBytes: disk.sizeBytes,
          ...disk.counts,
          ignoredErrors: ends[index]?.progress.ignoredErrorCount ?? 0,
          guest: ends[index]?.progress,
        })),
        qemu: ends[0]?.info.qemu,
        freeze: ends[0]?.info.freeze,
      },
      this.name,
      Math.max(0, ...ends.map(({ progress }) => progress.elapsedMs)),
      this.#context,
    );
  }

  /** Gives up what is not complete. Never rejects. */
  async end(): Promise<void> {
    await this.#session?.abort(
      new CowcatcherError({ code: "CANCELLED", object: this.name, problem: "the backup was given up" }),
    );
  }
}
