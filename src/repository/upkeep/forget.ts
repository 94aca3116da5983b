// Ending backups, and protecting them from it. What a forgotten backup alone referred to goes with the next prune.

import { CowcatcherError } from "../../errors.js";
import { backupFolder, type BackupName, manifestName, PROTECTED } from "../format/names.js";
import type { Repository } from "../repository.js";
import { type Decision, decideRetention, type Retention } from "./retention.js";

export interface ForgetOptions {
  dryRun: boolean;
  /** Called for each backup when it is decided, or done. */
  onDecision?: ((decision: Decision) => void) | undefined;
}

/** @throws CowcatcherError USAGE without a rule; NOT_FOUND for a group without backups. */
export async function forgetByRules(
  repository: Repository,
  group: string,
  retention: Retention,
  { dryRun, onDecision }: ForgetOptions,
): Promise<Decision[]> {
  const entries = await repository.backups(group);
  const decisions = decideRetention(entries, retention);
  if (entries.length === 0) throw noBackups(repository.name, group);
  for (const decision of decisions) {
    if (!decision.keep && !dryRun) await forgetBackup(repository, { group, time: decision.time });
    onDecision?.(decision);
  }
  return decisions;
}

/** One backup. @throws CowcatcherError EXISTS (protected) */
export async function forgetBackup(repository: Repository, backup: BackupName): Promise<void> {
  const { store } = repository;
  const folder = backupFolder(backup);
  // Asked again: it may have been protected since.
  if ((await store.head(folder + PROTECTED)) !== undefined) throw protectedError(repository.name, backup);
  await removeBackup(repository, backup);
}

/** The manifest first: without it the rest is no backup, and prune finds it. */
export async function removeBackup({ store }: Repository, backup: BackupName): Promise<void> {
  const folder = backupFolder(backup);
  await store.delete(manifestName(backup));
  await store.flush();
  for await (const batch of store.list(folder)) {
    for (const { name } of batch) await store.delete(name);
  }
  await store.flush();
}

export async function protectBackup({ store }: Repository, backup: BackupName): Promise<void> {
  await store.put(backupFolder(backup) + PROTECTED, Buffer.from("protected\n"), { durable: true });
  await store.flush();
}

export async function unprotectBackup({ store }: Repository, backup: BackupName): Promise<void> {
  await store.delete(backupFolder(backup) + PROTECTED);
  await store.flush();
}

function protectedError(storeName: string, { group, time }: BackupName): CowcatcherError {
  return new CowcatcherError({
    code: "EXISTS",
    object: `${storeName}::${group}@${time}`,
    problem: "is protected",
    hint: "unprotect it first",
  });
}

function noBackups(storeName: string, group: string): CowcatcherError {
  return new CowcatcherError({
    code: "NOT_FOUND",
    object: `${storeName}::${group}`,
    problem: "the group has no backup",
    hint: "see repo list",
  });
}
