// `repo`: what is done with a repository as a whole.
import { randomBytes } from "node:crypto";
import { closeSync, fsyncSync, openSync, writeSync } from "node:fs";
import { CowcatcherError, ioError } from "../../errors.js";
import {
  CHUNK_SIZES_BYTES,
  DEFAULT_CHUNK_BYTES,
  DEFAULT_COMPRESSION,
  parseChunkCompression,
} from "../../repository/format/config.js";
import type { Manifest } from "../../repository/format/manifest.js";
import { type BackupEntry, Repository } from "../../repository/repository.js";
import { prune } from "../../repository/upkeep/prune.js";
import { type GroupStats, readStats } from "../../repository/upkeep/stats.js";
import { inParallel, READERS } from "../../repository/work/parallel.js";
import { formatBytes } from "../../units.js";
import { usageError } from "../options/options.js";
import { keySource, repositoryArguments } from "../options/repository-options.js";
import { alignColumns, fitColumns } from "../output/columns.js";
import { type CommandContext, printJsonDocument, printLine } from "../output/context.js";
import { EXIT } from "../output/exit-codes.js";
import { refuseRest, type RepoFlags, withRepository } from "./repo-common.js";

export interface InitFlags extends RepoFlags {
  chunkSize?: number;
  compression?: string;
  newKeyFile?: boolean;
  encryption?: boolean;
}

export async function runInit(args: string[], flags: InitFlags, { output }: CommandContext): Promise<number> {
  const { repository, rest } = repositoryArguments(args, flags.repo);
  refuseRest(rest);
  const chunkBytes = flags.chunkSize ?? DEFAULT_CHUNK_BYTES;
  if (!CHUNK_SIZES_BYTES.includes(chunkBytes)) {
    throw usageError("--chunk-size", `${chunkBytes} is none`, "give 1M, 2M, 4M or 8M");
  }
  if (flags.newKeyFile === true) makeKeyFile(flags.keyFile);
  const key = flags.encryption === false ? undefined : keySource(flags);
  const compression =
    flags.compression === undefined
      ? DEFAULT_COMPRESSION
      : parseChunkCompression(flags.compression, "--compression");
  const made = await Repository.init(repository, { chunkBytes, compression, key });
  const { id, encryption } = made.config;
  if (output.json) printJsonDocument(output, { repository, id, encryption, chunk_bytes: chunkBytes });
  else if (!output.quiet) {
    const how = key === undefined ? "not encrypted" : `encrypted, opened by ${describeKey(key)}`;
    printLine(output, `${repository}: repository ${id.slice(0, 8)} made, ${how}`);
    if (key !== undefined)
      printLine(output, "Without its key nothing can be read: keep a copy of it elsewhere.");
  }
  return EXIT.done;
}

function describeKey(key: NonNullable<ReturnType<typeof keySource>>): string {
  return key.kind === "file" ? `the key file ${key.path}` : "a passphrase";
}

function makeKeyFile(path: string | undefined): void {
  if (path === undefined) throw usageError("--new-key-file", "needs --key-file", "name the file to be made");
  try {
    const fd = openSync(path, "wx", 0o600);
    try {
      writeSync(fd, `${randomBytes(32).toString("hex")}\n`);
      fsyncSync(fd);
    } finally {
      closeSync(fd);
    }
  } catch (error) {
    throw ioError("make the key file", path, error);
  }
}

interface ListedBackup extends BackupEntry {
  manifest: Manifest | undefined;
  /** Why there is none. */
  problem: string | undefined;
}

export function runList(args: string[], flags: RepoFlags, { output }: CommandContext): Promise<number> {
  const { repository: address, rest } = repositoryArguments(args, flags.repo);
  const [group, ...more] = rest;
  refuseRest(more);
  return withRepository(address, flags, async (repository) => {
    const entries = await repository.backups(group);
    const listed: ListedBackup[] = entries.map((entry) => ({
      ...entry,
      manifest: undefined,
      problem: undefined,
    }));
    await inParallel(listed, READERS, async (backup) => {
      try {
        backup.manifest = await repository.readManifest(backup);
      } catch (error) {
        if (!(error instanceof CowcatcherError)) throw error;
        backup.problem = error.problem;
      }
    });
    if (output.json) printJsonDocument(output, listed.map(listDocument));
    else for (const line of listLines(listed)) printLine(output, line);
    return EXIT.done;
  });
}

function listDocument({ group, time, isProtected, isVerified, manifest, problem }: ListedBackup): object {
  return {
    group,
    t0: time,
    protected: isProtected,
    verified: isVerified,
    ...(problem === undefined ? {} : { damaged: problem }),
    level: manifest?.level ?? null,
    level_reason: manifest?.level_reason ?? null,
    parent: manifest?.parent ?? null,
    checkpoint: manifest?.checkpoint ?? null,
    disks: (manifest?.disks ?? []).map(({ name, size_bytes, new_chunk_count, new_bytes, format }) => ({
      name,
      bytes: size_bytes,
      new_chunks: new_chunk_count,
      new_bytes,
      format,
    })),
  };
}

function listLines(backups: readonly ListedBackup[]): string[] {
  const rows = backups.map(({ group, time, isProtected, isVerified, manifest, problem }) => {
    const disks = manifest?.disks ?? [];
    const marks = [isProtected ? "protected" : "", isVerified ? "verified" : "", problem ?? ""];
    return [
      group,
      time,
      disks.map(({ name, size_bytes }) => `${name} ${formatBytes(size_bytes)}`).join(", "),
      manifest === undefined ? "damaged" : manifest.level,
      formatBytes(disks.reduce((sum, { new_bytes }) => sum + new_bytes, 0)),
      marks.filter((mark) => mark !== "").join(", "),
    ];
  });
  return alignColumns([["GROUP", "TIME", "DISKS", "LEVEL", "NEW", ""], ...rows]);
}

export function runPrune(args: string[], flags: RepoFlags, { output }: CommandContext): Promise<number> {
  const { repository: address, rest } = repositoryArguments(args, flags.repo);
  refuseRest(rest);
  return withRepository(address, flags, async (repository) => {
    const result = await prune(repository, { dryRun: flags.dryRun ?? false });
    const { chunks, used, deleted, deletedBytes, claimed, unfinished } = result;
    if (output.json) {
      printJsonDocument(output, {
        chunks,
        used,
        deleted,
        deleted_bytes: deletedBytes,
        claimed,
        unfinished_backups: unfinished,
        dry_run: flags.dryRun ?? false,
      });
    } else if (!output.quiet) {
      const verb = flags.dryRun === true ? "would be freed" : "freed";
      printLine(
        output,
        `${chunks} chunks, ${used} in use; ${deleted} (${formatBytes(deletedBytes)}) ${verb}`,
      );
      if (claimed > 0) printLine(output, `${claimed} more are counted on by backups that run`);
      if (unfinished > 0)
        printLine(output, `${unfinished} backups that were never completed were cleared away`);
    }
    return EXIT.done;
  });
}

function statsTable(groups: readonly GroupStats[]): string[] {
  const rows = groups.map(({ group, backups, last, diskBytes, newBytes }) => [
    group,
    String(backups),
    last.replace(/\.\d+Z$/, "Z"),
    formatBytes(diskBytes),
    formatBytes(newBytes),
  ]);
  return fitColumns([["GROUP", "BACKUPS", "LAST", "DISKS", "NEW"], ...rows]);
}

export function runStats(args: string[], flags: RepoFlags, { output }: CommandContext): Promise<number> {
  const { repository: address, rest } = repositoryArguments(args, flags.repo);
  refuseRest(rest);
  return withRepository(address, flags, async (repository) => {
    const stats = await readStats(repository);
    const { groups, backups, diskBytes, chunks, chunkBytes, metadataBytes, damagedChunks } = stats;
    if (output.json) {
      printJsonDocument(output, {
        groups,
        backups,
        disk_bytes: diskBytes,
        chunks,
        chunk_bytes: chunkBytes,
        metadata_bytes: metadataBytes,
        damaged_chunks: damagedChunks,
        by_group: stats.byGroup.map(({ group, backups: count, last, diskBytes: bytes, newBytes }) => ({
          group,
          backups: count,
          last,
          disk_bytes: bytes,
          new_bytes: newBytes,
        })),
      });
      return EXIT.done;
    }
    for (const line of statsTable(stats.byGroup)) printLine(output, line);
    printLine(output, `backups: ${backups}, groups: ${groups}, disks of ${formatBytes(diskBytes)}`);
    printLine(
      output,
      `chunks: ${chunks}, ${formatBytes(chunkBytes)}; indexes and manifests ${formatBytes(metadataBytes)}`,
    );
    if (damagedChunks > 0) printLine(output, `${damagedChunks} damaged chunks set aside`);
    return EXIT.done;
  });
}
