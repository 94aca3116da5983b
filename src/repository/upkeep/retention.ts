// Which backups of a group stay: the rules, names, order and calendar of the Proxmox Backup Server.
//
// The rules are applied one after another: last, hourly, daily, weekly, monthly, yearly. Each looks at the backups from
// the newest to the oldest and keeps the newest of each of its periods, as many periods as it has been given. A
// period that has a backup kept by an earlier rule is passed over and does not count. What a rule has decided about,
// kept or not, no later rule looks at again. Periods are those of the local calendar (the time zone of this
// process, TZ): the hour that comes twice when summer time ends is one hour; weeks are those of ISO 8601, from Monday.
// What is protected stays, and counts for no rule.
//
// (PBS: "Maintenance: Pruning", and its pbs-datastore/src/prune.rs, in which the same is written.)

import { CowcatcherError } from "../../errors.js";
import { backupTimeMs } from "../format/names.js";

export const RULES = ["last", "hourly", "daily", "weekly", "monthly", "yearly"] as const;
export type Rule = (typeof RULES)[number];
/** How many of each; a rule that is not given keeps nothing. */
export type Retention = Partial<Record<Rule, number>>;

export interface Retained {
  time: string;
  isProtected: boolean;
}

export interface Decision {
  time: string;
  keep: boolean;
  /** "keep-daily 2026-11-28", "protected", "no rule keeps it". */
  reason: string;
}

/**
 * @param backups of one group, in any order. @returns in the order of time, the oldest first
 * @throws CowcatcherError USAGE without a rule, as that would forget everything.
 */
export function decideRetention(backups: readonly Retained[], retention: Retention): Decision[] {
  if (RULES.every((rule) => (retention[rule] ?? 0) === 0)) {
    throw new CowcatcherError({
      code: "USAGE",
      object: "repo forget",
      problem: "no rule is given, and without one every backup would go",
      hint: "give --keep-last 1 or another rule",
    });
  }
  const newestFirst = [...backups].sort((a, b) => (a.time < b.time ? 1 : -1));
  const decided = new Map<string, Decision>();
  for (const rule of RULES) {
    const count = retention[rule];
    if (count !== undefined) applyRule(rule, count, newestFirst, decided);
  }
  return newestFirst.reverse().map(({ time, isProtected }) => {
    if (isProtected) return { time, keep: true, reason: "protected" };
    return decided.get(time) ?? { time, keep: false, reason: "no rule keeps it" };
  });
}

function applyRule(
  rule: Rule,
  count: number,
  newestFirst: readonly Retained[],
  decided: Map<string, Decision>,
): void {
  const provided = new Set(
    [...decided.values()].filter(({ keep }) => keep).map(({ time }) => periodOf(rule, time)),
  );
  const kept = new Set<string>();
  for (const { time, isProtected } of newestFirst) {
    if (decided.has(time) || isProtected) continue;
    const period = periodOf(rule, time);
    if (provided.has(period)) continue;
    if (kept.has(period)) {
      decided.set(time, { time, keep: false, reason: `a later one of ${rule} ${period} is kept` });
      continue;
    }
    if (kept.size >= count) return;
    kept.add(period);
    decided.set(time, { time, keep: true, reason: rule === "last" ? "keep-last" : `keep-${rule} ${period}` });
  }
}

/** The name of the period that a backup's time falls into, by the local calendar. */
export function periodOf(rule: Rule, time: string): string {
  const local = new Date(backupTimeMs(time));
  const year = String(local.getFullYear());
  const month = `${year}-${twoDigits(local.getMonth() + 1)}`;
  const day = `${month}-${twoDigits(local.getDate())}`;
  switch (rule) {
    case "last":
      return time;
    case "hourly":
      return `${day} ${twoDigits(local.getHours())}h`;
    case "daily":
      return day;
    case "weekly":
      return isoWeek(local);
    case "monthly":
      return month;
    case "yearly":
      return year;
  }
}

/** ISO 8601: the week with the year's first Thursday is its first. */
function isoWeek(local: Date): string {
  const thursday = new Date(Date.UTC(local.getFullYear(), local.getMonth(), local.getDate()));
  thursday.setUTCDate(thursday.getUTCDate() + 4 - (thursday.getUTCDay() || 7));
  const year = thursday.getUTCFullYear();
  const dayOfYear = (thursday.getTime() - Date.UTC(year, 0, 1)) / 86_400_000;
  return `${year}-W${twoDigits(Math.floor(dayOfYear / 7) + 1)}`;
}

function twoDigits(value: number): string {
  return String(value).padStart(2, "0");
}
