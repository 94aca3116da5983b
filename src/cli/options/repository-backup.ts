// `backup SOURCE… --repo REPO --group NAME`: from commander's values to settings.
import { absoluteName } from "../../file-names.js";
import { readFileSync } from "node:fs";
import type { Command } from "commander";
import {
  BACKUP_LEVELS,
  JOB_DEFAULTS,
  type LevelChoice,
  OFFLINE_WORKER_COUNT,
  type RepositoryPlace,
} from "../../backup/options.js";
import { isS3Address } from "../../repository/store/s3-address.js";
import type { RepositoryBackupRequest } from "../../backup/job/repository-backup.js";
import { ioError } from "../../errors.js";
import type { FreezeRequest } from "../../qemu/t0-gate.js";
import { diskNameOf } from "../../run/disk-name.js";
import { checkDisk, checkGroup } from "../../repository/format/names.js";
import { refuseCheckpointFlags } from "./checkpoint-flags.js";
import type { BackupFlags } from "./backup-flags.js";
import { freezeRequest, refuseLiveFlags } from "./live-flags.js";
import { jobSettings } from "./backup-options.js";
import type { JobSettings, LiveDiskSettings } from "./job-settings.js";
import { type LibvirtBackupSettings, libvirtSettings } from "./libvirt-options.js";
import { type QemuBackupSettings, qemuSettings, refuseQemuFlags } from "./qemu-options.js";
import { choiceOption, listWords, NULL_TARGET, parseImage, textOption, usageError } from "./options.js";
import { addKeyOptions, lazyKey } from "./repository-options.js";

export interface RepositoryBackupSettings extends Pick<
  RepositoryBackupRequest,
  "repository" | "key" | "group" | "level" | "sources" | "job" | "vmConfig"
> {
  mode: "repository";
}

/** Disks that a server has open, as one backup. */
export interface RepositoryLiveSettings {
  mode: "repository-live";
  control: string;
  guestAgent: FreezeRequest | undefined;
  /** Node names; none: all that the server has. */
  disks: readonly string[];
  job: JobSettings;
  place: Omit<RepositoryPlace, "disk">;
}

/** Disks of a guest that QEMU runs, as one backup; as it is managed, by QMP or by libvirt. */
export type RepositoryQemuSettings = Pick<
  RepositoryBackupRequest,
  "repository" | "key" | "group" | "level" | "vmConfig"
> & {
  mode: "repository-qemu";
  guest: QemuBackupSettings | LibvirtBackupSettings;
  /** QEMU keeps bitmaps, or libvirt checkpoints, for the next backup. */
  keepsBitmaps: boolean;
  /** Of each disk. */
  job: JobSettings;
};

/** `--bitmap none` */
const NO_BITMAPS = "none";
const MAX_VM_CONFIG_BYTES = 1024 * 1024;

export function addRepositoryBackupOptions(command: Command): Command {
  return addKeyOptions(
    command
      .addOption(
        textOption("--repo <REPO>", "repository to write to, in the place of a TARGET (COWCATCHER_REPO)"),
      )
      .addOption(textOption("--group <NAME>", "group of the backup in the repository: one for each machine"))
      .addOption(
        choiceOption(
          "--level <LEVEL>",
          `for a repository: ${listWords(BACKUP_LEVELS)}; what is there is never stored again (auto)`,
          BACKUP_LEVELS,
        ),
      )
      .addOption(textOption("--vm-config <FILE>", "description of the machine, kept with the backup")),
  );
}

/** Whether the backup goes into a repository. */
export function isRepositoryBackup(flags: BackupFlags): boolean {
  return flags.repo !== undefined || flags.group !== undefined;
}

/** Which backup of which repository. @throws CowcatcherError USAGE, IO */
function repositoryOf(flags: BackupFlags) {
  const { group, level } = flags;
  const repository = flags.repo ?? process.env["COWCATCHER_REPO"] ?? "";
  if (repository === "")
    throw usageError("--repo", "is missing", "name the repository, or set COWCATCHER_REPO");
  if (group === undefined)
    throw usageError("--group", "is missing", "name the group, such as the machine's name");
  refuseUseless(flags);
  return {
    repository,
    group: checkGroup(group),
    level: level ?? "auto",
    vmConfig: flags.vmConfig === undefined ? undefined : readVmConfig(flags.vmConfig),
  };
}

/** @throws CowcatcherError USAGE for a combination that cannot mean anything; IO for a file that cannot be read. */
export function parseRepositoryBackup(
  args: readonly string[],
  flags: BackupFlags,
): RepositoryBackupSettings | RepositoryLiveSettings | RepositoryQemuSettings {
  const { libvirt, qmp } = flags;
  if (libvirt !== undefined) {
    return parseQemuIntoRepository(args, flags, "--libvirt", (disks, rest) =>
      libvirtSettings(libvirt, disks, rest),
    );
  }
  if (qmp !== undefined) {
    return parseQemuIntoRepository(args, flags, "--qmp", (disks, rest) => qemuSettings(qmp, disks, rest));
  }
  refuseQemuFlags(flags);
  if (flags.control !== undefined) return parseLiveIntoRepository(args, flags, flags.control);
  return parseOfflineIntoRepository(args, flags);
}

/** Of disks that others have open: what goes for both of them. */
function liveParts(args: readonly string[], flags: BackupFlags, option: string) {
  if (args[0] !== undefined) {
    throw usageError(args[0], "does not go with --repo", `${option} says which disks: there is no TARGET`);
  }
  for (const name of ["checkpoint", "since", "sinceOrFull"] as const) {
    if (flags[name] === undefined) continue;
    const flag = `--${name.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)}`;
    throw usageError(
      flag,
      "does not go with --repo",
      "the repository keeps checkpoints of its own: see --level",
    );
  }
  const { sourceFormat, snapshot, bitmap, bitmapMode } = flags;
  const useless = Object.entries({
    "source-format": sourceFormat,
    snapshot,
    bitmap,
    "bitmap-mode": bitmapMode,
  });
  const given = useless.find(([, value]) => value !== undefined);
  if (given !== undefined) throw usageError(`--${given[0]}`, `does not go with ${option}`, "leave it out");
  const { disk: disks = [] } = flags;
  const twice = disks.find((name, index) => disks.indexOf(name) !== index);
  if (twice !== undefined) throw usageError("--disk", `'${twice}' is given twice`);
  const job = { ...jobSettings(NULL_TARGET, { ...flags, verify: undefined }), targetFormat: "raw" as const };
  return { disks, job };
}

function parseLiveIntoRepository(
  args: readonly string[],
  flags: BackupFlags,
  control: string,
): RepositoryLiveSettings {
  const { repository, ...place } = repositoryOf(flags);
  const { disks, job } = liveParts(args, flags, "--control");
  return {
    mode: "repository-live",
    control: absoluteName(control),
    guestAgent: freezeRequest(flags),
    disks,
    job,
    place: {
      ...place,
      // The credentials are the server's business.
      address: isS3Address(repository) ? repository : absoluteName(repository),
      ...keyFiles(flags),
      tool: "",
    },
  };
}

function parseQemuIntoRepository(
  args: readonly string[],
  flags: BackupFlags,
  option: string,
  guestOf: (disks: LiveDiskSettings[], flags: BackupFlags) => RepositoryQemuSettings["guest"],
): RepositoryQemuSettings {
  const place = repositoryOf(flags);
  const { bitmap } = flags;
  const rest = bitmap === "auto" || bitmap === NO_BITMAPS ? { ...flags, bitmap: undefined } : flags;
  const { disks, job } = liveParts(args, rest, option);
  const guest = guestOf(
    disks.map((disk) => ({ disk, job })),
    rest,
  );
  const keepsBitmaps = bitmap !== NO_BITMAPS;
  return { mode: "repository-qemu", guest, keepsBitmaps, job, key: lazyKey(flags), ...place };
}

/** For the process that has the disk open: it reads them, and no secret is sent. @throws CowcatcherError USAGE */
function keyFiles({
  keyFile,
  passphraseFile,
}: BackupFlags): Pick<RepositoryPlace, "keyFile" | "passphraseFile"> {
  if (keyFile !== undefined && passphraseFile !== undefined) {
    throw usageError("--key-file", "does not go with --passphrase-file", "give one of them");
  }
  const { COWCATCHER_KEY_FILE: file, COWCATCHER_PASSPHRASE_FILE: textFile } = process.env;
  if (keyFile !== undefined) return { keyFile: absoluteName(keyFile) };
  if (passphraseFile !== undefined) return { passphraseFile: absoluteName(passphraseFile) };
  if (file !== undefined && file !== "") return { keyFile: absoluteName(file) };
  if (textFile !== undefined && textFile !== "") return { passphraseFile: absoluteName(textFile) };
  return {};
}

function parseOfflineIntoRepository(args: readonly string[], flags: BackupFlags): RepositoryBackupSettings {
  const place = repositoryOf(flags);
  const { disk: names = [] } = flags;
  if (args.length === 0) throw usageError("SOURCE", "is missing", "give the images of the machine's disks");
  refuseCheckpointFlags(flags);
  refuseLiveFlags(flags);
  if (names.length > 0 && names.length !== args.length) {
    throw usageError(
      "--disk",
      `given ${names.length} times for ${args.length} SOURCEs`,
      "give one for each, in order",
    );
  }
  const sources = args.map((source, index) => ({
    path: parseImage(source, "SOURCE"),
    disk: checkDisk(names[index] ?? diskNameOf(source)),
    format: flags.sourceFormat,
    snapshot: flags.snapshot,
  }));
  const repeated = sources.find(
    ({ disk }, index) => sources.findIndex((other) => other.disk === disk) !== index,
  );
  if (repeated !== undefined) {
    throw usageError(
      repeated.disk,
      "would be the name of two disks",
      "name them with --disk, one for each SOURCE",
    );
  }
  return {
    mode: "repository",
    ...place,
    key: lazyKey(flags),
    sources,
    job: {
      ...JOB_DEFAULTS,
      bitmap: flags.bitmap,
      workerCount: flags.workers ?? OFFLINE_WORKER_COUNT,
      cowBufferSizeBytes: 0,
      rateLimitBytes: flags.rateLimit ?? JOB_DEFAULTS.rateLimitBytes,
      onSourceError: flags.onSourceError ?? JOB_DEFAULTS.onSourceError,
      onTargetError: flags.onTargetError ?? JOB_DEFAULTS.onTargetError,
      targetRetries: flags.targetRetries ?? JOB_DEFAULTS.targetRetries,
      direct: flags.direct ?? JOB_DEFAULTS.direct,
    },
  };
}

/** What a repository has no use for. Passed over in silence, it would look as if it had been heeded. */
function refuseUseless(flags: BackupFlags): void {
  const { targetFormat, clusterSize, verify, force, backingFile, backingFormat, compress, dryRun, sync } =
    flags;
  const useless = Object.entries({
    "target-format": targetFormat,
    "cluster-size": clusterSize,
    force,
    "backing-file": backingFile,
    "backing-format": backingFormat,
    compress,
    "dry-run": dryRun,
    sync: sync === "full" ? undefined : sync,
  }).find(([, value]) => value !== undefined);
  if (useless !== undefined) throw usageError(`--${useless[0]}`, "does not go with --repo", "leave it out");
  if (verify === true) {
    throw usageError("--verify", "does not go with --repo", "run repo verify afterwards");
  }
  if (flags.onTargetError === "ignore") {
    throw usageError("--on-target-error", "ignore would leave gaps in the backup", "give report or stop");
  }
}

function readVmConfig(path: string): string {
  try {
    const content = readFileSync(absoluteName(path));
    if (content.length > MAX_VM_CONFIG_BYTES)
      throw usageError(path, "is larger than 1 MiB", "give a smaller file");
    return content.toString("utf8");
  } catch (error) {
    throw ioError("read", path, error);
  }
}

export type { LevelChoice };
