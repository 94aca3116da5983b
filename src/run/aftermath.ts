// What follows a backup that went well: it is verified, written down, and old ones are removed.
import { basename, dirname } from "node:path";
import { CowcatcherError } from "../errors.js";
import { decideFiles } from "./chain-retention.js";
import type { ChildResult } from "./child.js";
import { type BackupManifest, MANIFEST_FORMAT, readHistory, removeBackup, writeManifest } from "./history.js";
import { foreignOverlays } from "./foreign-overlays.js";
import { isOfQemu, type Job } from "./job.js";
import { isObject } from "./outcome.js";
import { hasTwoBitmaps, isCheckpointOf, ownerArguments, type Plan } from "./plan.js";
import type { DiskResult, LineLevel } from "./result.js";
import { RULES, type Retention } from "../repository/upkeep/retention.js";

export interface Aftermath {
  job: Job;
  plan: Plan;
  disks: readonly DiskResult[];
  level: "full" | "incremental";
  levelReason: string;
  start: Date;
  version: string;
  run: (args: readonly string[]) => Promise<ChildResult>;
  say: (level: LineLevel, line: string) => void;
}

/**
 * As `readBack`; where a backup is bad, its bitmap in QEMU goes: the next one is built on the same base as this one was.
 * @throws CowcatcherError VERIFY where it is damaged
 */
export async function verifyBackups(work: Aftermath): Promise<boolean> {
  try {
    return await readBack(work);
  } catch (error) {
    await endBitmaps(
      work,
      work.plan.disks.map(({ target }) => target),
    );
    throw error;
  }
}

/**
 * Whether it was read back. A full backup into a file was read back by `backup --verify`; an incremental one is checked for its
 * structure alone, as what it was read from has changed; of a repository its chunks are read.
 * @throws CowcatcherError VERIFY where it is damaged
 */
async function readBack({ job, plan, disks, level, run, say }: Aftermath): Promise<boolean> {
  const { verify, target, group } = job;
  if (verify === undefined) return false;
  if (target.kind === "repository") {
    const sample = verify === true ? [] : ["--sample", verify];
    // By its whole name: the chunks of this backup.
    const names = [...new Set(disks.map(({ target: name }) => name.slice(name.lastIndexOf("::") + 2)))];
    const args = ["repo", "verify", target.repository, ...names, ...sample, ...job.keyArguments];
    return mustBe(await run(args), `${target.repository}::${group}`);
  }
  if (level === "full") return true;
  if (!target.pattern.isFile) return false;
  for (const { target: path } of plan.disks) mustBe(await run(["check", path]), path);
  say("info", "the incremental backup was checked for its structure, not compared");
  return false;
}

function mustBe({ exitCode, error }: ChildResult, object: string): true {
  if (exitCode === 0) return true;
  throw (
    error ??
    new CowcatcherError({
      code: "VERIFY",
      object,
      problem: `is damaged (exit code ${exitCode})`,
      hint: "make another backup",
    })
  );
}

/** Manifests for files; then the server forgets the checkpoints of this job before the new one. */
export async function noteBackups(work: Aftermath & { isVerified: boolean }): Promise<void> {
  const { job, plan, disks, level, levelReason, start, version, isVerified } = work;
  if (job.target.kind !== "pattern" || !job.target.pattern.isFile) return;
  for (const [index, planned] of plan.disks.entries()) {
    const disk = disks[index];
    const manifest: BackupManifest = {
      format: MANIFEST_FORMAT,
      job: job.name,
      group: job.group,
      disk: planned.label,
      source: planned.source,
      t0: disk?.t0 ?? start.toISOString(),
      level,
      level_reason: levelReason,
      parent: level === "incremental" && planned.parent !== undefined ? planned.parent.file : null,
      checkpoint: plan.checkpoint ?? null,
      ...(isOfQemu(job.source) ? { qemu_bitmap: plan.isRemembered } : {}),
      target_format: /\.qcow2?$/i.test(planned.target) ? "qcow2" : null,
      bytes: disk?.bytes ?? 0,
      bytes_on_target: disk?.bytes_on_target ?? null,
      seconds: (Date.now() - start.getTime()) / 1000,
      verified: isVerified,
      ignored_errors: disk?.ignored_errors ?? 0,
      version,
    };
    await writeManifest(planned.target, manifest);
  }
  await forgetCheckpoints(work);
  await endBitmaps(
    work,
    plan.disks.flatMap(({ history }) =>
      history.filter((one) => one.qemu_bitmap === true).map(({ path }) => path),
    ),
  );
}

/** Those of backups that nothing is built on any more, where they were kept. What is left goes with the next ones. */
async function endBitmaps({ job, plan, run, say }: Aftermath, files: readonly string[]): Promise<void> {
  if (job.source.kind === "images" || !hasTwoBitmaps(plan)) return;
  const replaced = files.flatMap((path) => ["--bitmap-replaces", path]);
  const { error } = await run(["backup", ...ownerArguments(job.source), "--cleanup", ...replaced]);
  if (error !== undefined) say("warning", `old bitmaps are left: ${error.message}`);
}

/** What is left over costs the server some memory, and is tried again the next time. */
async function forgetCheckpoints({ job, plan, run, say }: Aftermath): Promise<void> {
  if (job.source.kind !== "control" || plan.checkpoint === undefined) return;
  const { socket } = job.source;
  const { messages, error } = await run(["checkpoints", "--control", socket]);
  const [list] = messages;
  if (error !== undefined) say("warning", `old checkpoints are left: ${error.message}`);
  const names = (Array.isArray(list) ? list : []).filter(isObject).map(({ name }) => name);
  for (const name of new Set(names)) {
    if (typeof name !== "string" || name === plan.checkpoint || !isCheckpointOf(job.name, name)) continue;
    const ended = await run(["checkpoints", "delete", name, "--control", socket]);
    if (ended.error !== undefined) say("warning", `the checkpoint ${name} is left: ${ended.error.message}`);
  }
}

/** What was removed. @throws CowcatcherError of what could not be */
export async function keepBackups(work: Aftermath): Promise<string[]> {
  const { job, plan, say } = work;
  const { retention, target } = job;
  if (retention === undefined) return [];
  if (target.kind === "repository")
    return forgetInRepository(work, retention, target.repository, target.prune);
  const removed: string[] = [];
  for (const { target: path, label } of plan.disks) {
    const history = await readHistory(dirname(path), job.name, label);
    const overlays = await foreignOverlays(dirname(path), history);
    for (const [file, overlay] of overlays) {
      say("warning", `${overlay} has no manifest and builds on ${file}, which therefore stays`);
    }
    for (const { backup, keep, reason } of decideFiles(history, retention, overlays)) {
      if (keep) continue;
      await removeBackup(backup);
      removed.push(backup.path);
      say("info", `removed ${basename(backup.path)}: ${reason}`);
    }
  }
  return removed;
}

async function forgetInRepository(
  { job, run, say }: Aftermath,
  retention: Retention,
  repository: string,
  prunes: boolean,
): Promise<string[]> {
  const rules = RULES.flatMap((rule) =>
    retention[rule] === undefined ? [] : [`--keep-${rule}`, String(retention[rule])],
  );
  const { messages, error } = await run([
    "repo",
    "forget",
    repository,
    job.group,
    ...rules,
    ...job.keyArguments,
  ]);
  if (error !== undefined) throw error;
  const [decisions] = messages;
  const removed = (Array.isArray(decisions) ? decisions : [])
    .filter(isObject)
    .filter(({ keep }) => keep === false)
    .map(({ t0, reason }) => {
      say("info", `forgotten ${String(t0)}: ${String(reason)}`);
      return `${repository}::${job.group}@${String(t0)}`;
    });
  if (removed.length > 0 && prunes) {
    const pruned = await run(["repo", "prune", repository, ...job.keyArguments]);
    if (pruned.error !== undefined) throw pruned.error;
  }
  return removed;
}
