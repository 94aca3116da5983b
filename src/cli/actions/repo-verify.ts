// `repo verify`: whether all that is there can be read.
import { CowcatcherError } from "../../errors.js";
import { parseBackupAddress } from "../../repository/address.js";
import { type BackupEntry, Repository } from "../../repository/repository.js";
import { verify } from "../../repository/upkeep/verify.js";
import { usageError } from "../options/options.js";
import { repositoryArguments } from "../options/repository-options.js";
import { type CommandContext, printJsonDocument, printLine } from "../output/context.js";
import { EXIT } from "../output/exit-codes.js";
import { warn } from "../output/report.js";
import { onInterrupt } from "../signals.js";
import { findEntry, type RepoFlags, withRepository } from "./repo-common.js";

export interface VerifyFlags extends RepoFlags {
  sample?: string;
}

export async function runVerify(
  args: string[],
  flags: VerifyFlags,
  context: CommandContext,
): Promise<number> {
  const { output } = context;
  const { repository: address, rest } = repositoryArguments(args, flags.repo);
  const samplePercent = parsePercent(flags.sample);
  const removeHandlers = onInterrupt(context, { onFirst: () => undefined });
  try {
    return await withRepository(address, flags, async (repository) => {
      const backups: BackupEntry[] = [];
      for (const name of rest) backups.push(...(await entriesOf(repository, name)));
      const result = await verify(repository, {
        backups: rest.length === 0 ? undefined : backups,
        samplePercent,
        isCancelled: () => context.interruptedBy !== undefined,
      });
      if (context.interruptedBy !== undefined) {
        throw new CowcatcherError({
          code: "CANCELLED",
          object: address,
          problem: "interrupted before it was done",
        });
      }
      const { damaged } = result;
      if (output.json) printJsonDocument(output, verifyDocument(result));
      else if (!output.quiet) {
        printLine(
          output,
          `${result.backups} backups, ${result.checked} of ${result.chunks} chunks read: ` +
            (damaged.length === 0 && result.badChunks === 0
              ? "no damage"
              : `${result.badChunks} bad, ${result.missingChunks} missing, ${result.setAside} set aside`),
        );
      }
      for (const { group, time, problems } of damaged) {
        const more = problems.length > 1 ? ` (and ${problems.length - 1} more)` : "";
        if (!output.json) warn(output, `${group}@${time}: ${problems[0] ?? ""}${more}`);
      }
      return damaged.length === 0 && result.badChunks === 0 ? EXIT.done : EXIT.verifyDifference;
    });
  } finally {
    removeHandlers();
  }
}

/** GROUP: all of it. GROUP@TIME: that one. */
async function entriesOf(repository: Repository, name: string): Promise<BackupEntry[]> {
  if (name.includes("@")) return [await findEntry(repository, name)];
  const entries = await repository.backups(parseBackupAddress(`${repository.name}::${name}`).group);
  return entries.length > 0 ? entries : [await findEntry(repository, name)];
}

function verifyDocument(result: Awaited<ReturnType<typeof verify>>): object {
  return {
    backups: result.backups,
    chunks: result.chunks,
    checked: result.checked,
    checked_bytes: result.checkedBytes,
    bad: result.badChunks,
    missing: result.missingChunks,
    set_aside: result.setAside,
    damaged: result.damaged.map(({ group, time, problems }) => ({ group, t0: time, problems })),
  };
}

function parsePercent(text: string | undefined): number {
  if (text === undefined) return 100;
  const percent = Number(/^(\d{1,3}(?:\.\d+)?)%?$/.exec(text)?.[1]);
  if (percent > 0 && percent <= 100) return percent;
  throw usageError("--sample", `'${text}' is no part of a hundred`, "give 5%");
}
