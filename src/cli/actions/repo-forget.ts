// `repo forget`, `repo protect`, `repo unprotect`: which backups stay.
import {
  forgetBackup,
  forgetByRules,
  protectBackup,
  unprotectBackup,
} from "../../repository/upkeep/forget.js";
import { type Retention, RULES } from "../../repository/upkeep/retention.js";
import { usageError } from "../options/options.js";
import { repositoryArguments } from "../options/repository-options.js";
import { type CommandContext, printJsonDocument, printLine } from "../output/context.js";
import { EXIT } from "../output/exit-codes.js";
import { findEntry, refuseRest, type RepoFlags, withRepository } from "./repo-common.js";

export interface ForgetFlags extends RepoFlags {
  keepLast?: number;
  keepHourly?: number;
  keepDaily?: number;
  keepWeekly?: number;
  keepMonthly?: number;
  keepYearly?: number;
}

export function runForget(args: string[], flags: ForgetFlags, { output }: CommandContext): Promise<number> {
  const { repository: address, rest } = repositoryArguments(args, flags.repo);
  const retention = retentionOf(flags);
  const named = rest.filter((text) => text.includes("@"));
  if (rest.length === 0) throw usageError("GROUP", "is missing", "give the group, or backups as GROUP@TIME");
  if (named.length > 0) {
    if (named.length < rest.length || Object.keys(retention).length > 0) {
      throw usageError(rest[0] ?? "", "names a backup: rules and groups do not go with it");
    }
    return forgetNamed(address, named, flags, output);
  }
  const [group = "", ...more] = rest;
  refuseRest(more);
  return withRepository(address, flags, async (repository) => {
    const dryRun = flags.dryRun ?? false;
    const decisions = await forgetByRules(repository, group, retention, { dryRun });
    if (output.json) {
      printJsonDocument(
        output,
        decisions.map(({ time, keep, reason }) => ({ group, t0: time, keep, reason, dry_run: dryRun })),
      );
    } else if (!output.quiet) {
      const verb = dryRun ? "would forget" : "forgotten";
      for (const { time, keep, reason } of decisions) {
        printLine(output, `${group}@${time}  ${keep ? "kept" : verb}: ${reason}`);
      }
    }
    return EXIT.done;
  });
}

function retentionOf(flags: ForgetFlags): Retention {
  const given = {
    last: flags.keepLast,
    hourly: flags.keepHourly,
    daily: flags.keepDaily,
    weekly: flags.keepWeekly,
    monthly: flags.keepMonthly,
    yearly: flags.keepYearly,
  };
  return Object.fromEntries(
    RULES.filter((rule) => given[rule] !== undefined).map((rule) => [rule, given[rule]]),
  );
}

function forgetNamed(
  address: string,
  names: readonly string[],
  flags: RepoFlags,
  output: CommandContext["output"],
): Promise<number> {
  return withRepository(address, flags, async (repository) => {
    const dryRun = flags.dryRun === true;
    const forgotten: object[] = [];
    for (const name of names) {
      const found = await findEntry(repository, name);
      if (!dryRun) await forgetBackup(repository, found);
      forgotten.push({ group: found.group, t0: found.time, keep: false, reason: "named", dry_run: dryRun });
      if (!output.quiet && !output.json) {
        printLine(output, `${found.group}@${found.time}  ${dryRun ? "would be forgotten" : "forgotten"}`);
      }
    }
    if (output.json) printJsonDocument(output, forgotten);
    return EXIT.done;
  });
}

export function runProtect(
  args: string[],
  isProtected: boolean,
  flags: RepoFlags,
  { output }: CommandContext,
): Promise<number> {
  const { repository: address, rest } = repositoryArguments(args, flags.repo);
  if (rest.length === 0) throw usageError("BACKUP", "is missing", "give REPO::GROUP@TIME");
  return withRepository(address, flags, async (repository) => {
    const changed: object[] = [];
    for (const name of rest) {
      const found = await findEntry(repository, name);
      changed.push({ group: found.group, t0: found.time, protected: isProtected });
      await (isProtected ? protectBackup : unprotectBackup)(repository, found);
      if (!output.quiet && !output.json) {
        printLine(
          output,
          `${found.group}@${found.time}  ${isProtected ? "protected" : "no longer protected"}`,
        );
      }
    }
    if (output.json) printJsonDocument(output, changed);
    return EXIT.done;
  });
}
