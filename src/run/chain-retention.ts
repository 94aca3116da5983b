// Retention of plain files: the rules of `repo forget` decide about each backup (repository/upkeep/retention.ts), and a chain
// goes when none of its backups is kept. So an overlay's base is never removed, and more stays than the rules alone say.
//
// Chains are told apart by what each backup builds on. A backup whose base is gone already is a chain with what
// builds on it: it goes by the same rules. A base may also be there and have lost its manifest: it is a file like any other
// that somebody has made on a backup, which keeps that backup's chain (foreign-overlays.ts).
import { CowcatcherError } from "../errors.js";
import { decideRetention, type Retention } from "../repository/upkeep/retention.js";
import type { KnownBackup } from "./history.js";

export interface FileDecision {
  backup: KnownBackup;
  keep: boolean;
  /** "keep-daily 2026-11-28", "a later backup of its chain is kept", … */
  reason: string;
}

/**
 * @param backups of one disk, in any order
 * @param overlays by backups' file names, files without a manifest that build on them
 * @returns what is removed in the order in which it must be: overlays before what they build on; then what is kept
 * @throws CowcatcherError USAGE without a rule
 */
export function decideFiles(
  backups: readonly KnownBackup[],
  retention: Retention,
  overlays: ReadonlyMap<string, string> = new Map(),
): FileDecision[] {
  // Two backups of one instant would be one to the rules.
  const times = new Map<string, KnownBackup>();
  for (const backup of backups) {
    const time = nanosecondTime(backup.t0);
    if (times.has(time)) throw twice(backup);
    times.set(time, backup);
  }
  const reasons = new Map<KnownBackup, { keep: boolean; reason: string }>();
  const decided = decideRetention(
    [...times.keys()].map((time) => ({ time, isProtected: false })),
    retention,
  );
  for (const { time, keep, reason } of decided) {
    const backup = times.get(time);
    if (backup !== undefined) reasons.set(backup, { keep, reason });
  }
  const removed: FileDecision[] = [];
  const kept: FileDecision[] = [];
  for (const chain of chainsOf(backups)) {
    const isRuled = chain.some((backup) => reasons.get(backup)?.keep === true);
    const overlay = chain.map(({ file }) => overlays.get(file)).find((name) => name !== undefined);
    const isKept = isRuled || overlay !== undefined;
    const whyKept = isRuled
      ? "another backup of its chain is kept"
      : `${overlay} builds on its chain, and has no manifest`;
    for (const backup of [...chain].reverse()) {
      const { keep, reason } = reasons.get(backup) ?? { keep: true, reason: "unknown" };
      const why = keep || !isKept ? reason : whyKept;
      (isKept ? kept : removed).push({ backup, keep: isKept, reason: why });
    }
  }
  return [...removed, ...kept];
}

/** Groups of backups that build on each other, each with what is built upon before what builds on it. */
export function chainsOf(backups: readonly KnownBackup[]): KnownBackup[][] {
  const known = new Set(backups.map(({ file }) => file));
  const children = new Map<string, KnownBackup[]>();
  const roots: KnownBackup[] = [];
  for (const backup of backups) {
    if (backup.parent === null || !known.has(backup.parent)) roots.push(backup);
    else children.set(backup.parent, [...(children.get(backup.parent) ?? []), backup]);
  }
  return roots.map((root) => {
    const chain = [root];
    // Each backup has one parent, so that none is met twice.
    for (let index = 0; index < chain.length; index++)
      chain.push(...(children.get(chain[index]?.file ?? "") ?? []));
    return chain;
  });
}

/** As backups in a repository are called. */
function nanosecondTime(t0: string): string {
  return new Date(t0).toISOString().replace("Z", "000000Z");
}

function twice({ path, t0 }: KnownBackup): CowcatcherError {
  return new CowcatcherError({
    code: "EXISTS",
    object: path,
    problem: `another backup of the same disk shows ${t0}, too`,
    hint: "move one of them and its .json away",
  });
}
