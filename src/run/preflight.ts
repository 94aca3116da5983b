// What is looked at before the guest is touched: that the backup disk is mounted, the folder can be written, and has room.
import { access, constants, mkdir, realpath, stat, statfs } from "node:fs/promises";
import { dirname } from "node:path";
import { mountPointsIn } from "../block/file/mounts.js";
import { CowcatcherError, ioError } from "../errors.js";
import { formatBytes } from "../units.js";
import type { ChildResult } from "./child.js";
import { isOfQemu, type Job } from "./job.js";
import { isObject } from "./outcome.js";
import type { Plan, PlannedDisk } from "./plan.js";
import { REACH_MS, reachFolder } from "./reach.js";

/** @throws CowcatcherError NOT_FOUND where `require-mount` is no mount point; IO (ETIMEDOUT) where it does not answer. */
export async function checkMount({ requireMount, timeLimitMs }: Job): Promise<void> {
  if (requireMount === undefined) return;
  await reachFolder(requireMount, { makes: false, timeoutMs: reachMs(timeLimitMs) });
  const folder = await realpath(requireMount).catch((error: unknown) => {
    throw ioError("find the mount point", requireMount, error);
  });
  const isMounted = folder === "/" || (await mountPointsIn(dirname(folder))).has(folder);
  if (isMounted) return;
  throw new CowcatcherError({
    code: "NOT_FOUND",
    object: requireMount,
    problem: "is not mounted",
    hint: "mount it, by the job's hook at job-init for instance",
  });
}

/** @param makesFolders false: only look. @throws CowcatcherError IO, NOT_FOUND; of a repository that this process does not write itself nothing. */
export async function checkFolders(job: Job, plan: Plan, makesFolders: boolean): Promise<void> {
  const { source, target } = job;
  const isWrittenHere = target.kind === "repository" && source.kind !== "control";
  const own = isWrittenHere && target.repository.startsWith("/") ? [target.repository] : [];
  for (const folder of own) {
    await access(folder, constants.W_OK | constants.X_OK).catch((error: unknown) => {
      throw ioError("write into the repository", folder, error);
    });
  }
  for (const folder of foldersOf(job, plan)) {
    try {
      if (makesFolders && !(await isThere(folder))) await mkdir(folder, { recursive: true, mode: 0o700 });
      await access(await existing(folder), constants.W_OK | constants.X_OK);
    } catch (error) {
      throw ioError("write into the folder", folder, error);
    }
  }
}

/** The nearest folder above that is there. */
async function existing(folder: string): Promise<string> {
  for (let at = folder; ; at = dirname(at)) {
    if (at === "/" || (await isThere(at))) return at;
  }
}

async function isThere(path: string): Promise<boolean> {
  return stat(path).then(
    () => true,
    () => false,
  );
}

/**
 * Before anything else asks for them: whether the target's storage answers at all.
 * @param writes the folders are made, and written to; else they are looked at
 * @throws CowcatcherError IO (ETIMEDOUT)
 */
export async function checkReach(
  { target, timeLimitMs }: Job,
  folders: readonly string[],
  writes: boolean,
): Promise<void> {
  const timeoutMs = reachMs(timeLimitMs);
  const isFolder = target.kind === "repository" && target.repository.startsWith("/");
  if (isFolder) await reachFolder(target.repository, { makes: false, timeoutMs });
  for (const folder of folders) await reachFolder(folder, { makes: writes, timeoutMs });
}

function reachMs(timeLimitMs: number | undefined): number {
  return Math.min(REACH_MS, timeLimitMs ?? REACH_MS);
}

function foldersOf(job: Job, plan: Plan): string[] {
  return [...new Set(fileDisks(job, plan).map(({ target }) => dirname(target)))];
}

function fileDisks({ target }: Job, { disks }: Plan): readonly PlannedDisk[] {
  return target.kind === "pattern" && target.pattern.isFile ? disks : [];
}

/**
 * What the next backup is expected to take, against what is free there: by the last one of its kind, summed by file
 * system; of the first by what `backup --dry-run` measures, where that can tell (not of a compressed one, nor of a guest
 * that QEMU runs). Of a repository in a folder by what the group's last backup brought that was new.
 * @throws CowcatcherError NO_SPACE; of a repository also what keeps it from being read
 */
export async function checkSpace(
  job: Job,
  plan: Plan,
  run: (args: readonly string[]) => Promise<ChildResult>,
): Promise<void> {
  if (!job.checkSpace) return;
  if (job.target.kind === "repository") return checkRepositorySpace(job, job.target.repository, run);
  const systems = new Map<number, { folder: string; neededBytes: number; freeBytes: number }>();
  const files = fileDisks(job, plan);
  const measured = files.some((disk) => lastBytes(disk, plan) === undefined)
    ? await measure(job, plan, run)
    : new Map<string, number>();
  for (const disk of files) {
    const bytes = lastBytes(disk, plan) ?? measured.get(disk.target) ?? 0;
    const folder = await existing(dirname(disk.target));
    const { dev } = await stat(folder);
    const { bavail, bsize } = await statfs(folder);
    const known = systems.get(dev) ?? { folder, neededBytes: 0, freeBytes: bavail * bsize };
    systems.set(dev, { ...known, neededBytes: known.neededBytes + bytes });
  }
  for (const { folder, neededBytes, freeBytes } of systems.values()) {
    if (freeBytes < neededBytes) throw tooLittle(folder, freeBytes, `the ${plan.level} backup`, neededBytes);
  }
}

/** A bucket has no end that anybody knows of. */
async function checkRepositorySpace(
  { group, keyArguments, source }: Job,
  repository: string,
  run: (args: readonly string[]) => Promise<ChildResult>,
): Promise<void> {
  if (!repository.startsWith("/")) return;
  const { messages, error } = await run(["repo", "list", repository, group, ...keyArguments]);
  // A server has the repository for itself: it may be another user's, and it says what is wrong.
  if (error !== undefined && source.kind === "control") return;
  if (error !== undefined) throw error;
  const last = messages.flat().filter(isObject).at(-1);
  const disks = (Array.isArray(last?.["disks"]) ? last["disks"] : []).filter(isObject);
  const neededBytes = disks.reduce(
    (sum, { new_bytes: bytes }) => sum + (typeof bytes === "number" ? bytes : 0),
    0,
  );
  const { bavail, bsize } = await statfs(repository);
  if (bavail * bsize < neededBytes) throw tooLittle(repository, bavail * bsize, "the backup", neededBytes);
}

function tooLittle(object: string, freeBytes: number, what: string, neededBytes: number): CowcatcherError {
  return new CowcatcherError({
    code: "NO_SPACE",
    object,
    problem: `${formatBytes(freeBytes)} are free there, and ${what} is expected to take ${formatBytes(neededBytes)}`,
    hint: "make room, keep fewer backups, or give check-space: false",
  });
}

function lastBytes({ history }: PlannedDisk, plan: Plan): number | undefined {
  return history.findLast(({ level }) => level === plan.level)?.bytes_on_target ?? undefined;
}

/** By target. Holes count towards the size of a raw file, so that nothing is said of one. */
async function measure(
  job: Job,
  plan: Plan,
  run: (args: readonly string[]) => Promise<ChildResult>,
): Promise<Map<string, number>> {
  const sizes = new Map<string, number>();
  const isCompressed = job.options.some((option) => /^--compress\b/.test(option));
  if (isOfQemu(job.source) || isCompressed || plan.level !== "full") return sizes;
  for (const { args } of plan.commands) {
    const { messages } = await run(["backup", "--dry-run", "--quiet", ...withoutCheckpoint(args)]);
    for (const document of messages.flat().filter(isObject)) {
      const { target, required, target_format: format } = document;
      if (typeof target === "string" && typeof required === "number" && format === "qcow2")
        sizes.set(target, required);
    }
  }
  return sizes;
}

/** Nothing is remembered of what is not made, nor held still for it. */
function withoutCheckpoint(args: readonly string[]): string[] {
  const at = args.indexOf("--checkpoint");
  const kept = at < 0 ? [...args] : [...args.slice(0, at), ...args.slice(at + 2)];
  return kept.filter((word) => !word.startsWith("--freeze="));
}
