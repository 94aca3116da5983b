// Files that a job leaves: patterns, manifests, chains, and which of them retention removes.
import { execFileSync } from "node:child_process";
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import fc from "fast-check";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { chainsOf, decideFiles } from "../../../src/run/chain-retention.js";
import { foreignOverlays } from "../../../src/run/foreign-overlays.js";
import {
  type BackupManifest,
  chainOf,
  type KnownBackup,
  MANIFEST_FORMAT,
  readHistory,
  removeBackup,
  writeManifest,
} from "../../../src/run/history.js";
import { dateWord, fillPattern, parsePattern } from "../../../src/run/pattern.js";
import { isInWindow, parseWindow } from "../../../src/run/window.js";

const DAY_MS = 86_400_000;
const START = Date.parse("2026-01-01T02:00:00.000Z");

const manifest = (
  t0: number,
  parent: string | null = null,
  more: Partial<BackupManifest> = {},
): BackupManifest => ({
  format: MANIFEST_FORMAT,
  job: "vm1",
  group: "vm1",
  disk: "root",
  source: "/run/vm1.ctl",
  t0: new Date(t0).toISOString(),
  level: parent === null ? "full" : "incremental",
  level_reason: "",
  parent,
  checkpoint: null,
  target_format: "qcow2",
  bytes: 1,
  bytes_on_target: 1,
  seconds: 1,
  verified: false,
  ignored_errors: 0,
  version: "0",
  ...more,
});

const known = (file: string, t0: number, parent: string | null): KnownBackup => ({
  ...manifest(t0, parent),
  file,
  path: `/b/${file}`,
});

/** A backup a day: fulls where `fulls` says so, else an overlay of the one before. */
function days(fulls: readonly boolean[]): KnownBackup[] {
  return fulls.map((isFull, day) => {
    const parent = isFull || day === 0 ? null : `day${day - 1}`;
    return known(`day${day}`, START + day * DAY_MS, parent);
  });
}

let folder: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "cowcatcher-history-"));
});
afterEach(() => rmSync(folder, { recursive: true, force: true }));

describe("retention of chains", () => {
  it("removes whole chains, overlays first, and says why the others stay", () => {
    const decisions = decideFiles(days([true, false, false, true, false, true]), { last: 2 });
    expect(decisions.map(({ backup, keep, reason }) => [backup.file, keep, reason])).toEqual([
      ["day2", false, "no rule keeps it"],
      ["day1", false, "no rule keeps it"],
      ["day0", false, "no rule keeps it"],
      ["day4", true, "keep-last"],
      ["day3", true, "another backup of its chain is kept"],
      ["day5", true, "keep-last"],
    ]);
  });

  it("never leaves an overlay without what it builds on, at whatever removal it is cut off", () => {
    const rules = fc.record({ last: fc.nat(3), daily: fc.nat(9), weekly: fc.nat(3) }, { requiredKeys: [] });
    fc.assert(
      fc.property(
        fc.array(fc.boolean(), { minLength: 1, maxLength: 40 }),
        rules,
        fc.nat(40),
        (fulls, retention, cut) => {
          if (Object.values(retention).every((count) => count === 0)) return;
          const backups = days(fulls);
          const removed = decideFiles(backups, retention)
            .filter(({ keep }) => !keep)
            .slice(0, cut)
            .map(({ backup }) => backup);
          const left = backups.filter((backup) => !removed.includes(backup));
          for (const backup of left) expect(chainOf(backup, left)).toBeDefined();
          expect(left).toContain(backups.at(-1));
        },
      ),
    );
  });

  it("keeps every backup that the rules keep", () => {
    const backups = days(Array.from({ length: 30 }, (_, day) => day % 7 === 0));
    const kept = decideFiles(backups, { daily: 5, weekly: 2 }).filter(({ keep }) => keep);
    // Days 25 to 29 by the day, and the two weeks before; with all of their chains.
    expect(kept.map(({ backup }) => backup.file).sort()).toEqual(
      backups
        .slice(14)
        .map(({ file }) => file)
        .sort(),
    );
  });

  it("keeps what an overlay without a manifest builds on: a backup that lost it, or somebody's own disk", async () => {
    const backups = days([true, false, false, false, true]);
    const path = (file: string): string => join(folder, file);
    for (const { file, parent } of backups) {
      const base = parent === null ? [] : ["-b", parent, "-F", "qcow2"];
      execFileSync("qemu-img", ["create", "-q", "-f", "qcow2", ...base, path(file), "1M"], { cwd: folder });
    }
    writeFileSync(path("notes"), "text");
    // The manifest of day2 is lost; day3 builds on it, and is not kept by a rule either.
    const history = backups.filter(({ file }) => file !== "day2");
    const overlays = await foreignOverlays(folder, history);
    expect([...overlays]).toEqual([["day1", "day2"]]);
    const reasons = decideFiles(history, { last: 1 }, overlays).map(({ backup, keep, reason }) => [
      ...[backup.file, keep, reason],
    ]);
    expect(reasons).toEqual([
      ["day3", false, "no rule keeps it"],
      ["day1", true, "day2 builds on its chain, and has no manifest"],
      ["day0", true, "day2 builds on its chain, and has no manifest"],
      ["day4", true, "keep-last"],
    ]);
    // By another name for it, from a disk of somebody's own; nothing of what cannot be opened.
    execFileSync("qemu-img", [
      "create",
      "-q",
      "-f",
      "qcow2",
      "-b",
      path("day4"),
      "-F",
      "qcow2",
      path("boot"),
      "1M",
    ]);
    execFileSync("qemu-img", [
      "create",
      "-q",
      "-f",
      "qcow2",
      "-u",
      "-b",
      "foo:bar",
      "-F",
      "raw",
      path("odd"),
      "1M",
    ]);
    expect([...(await foreignOverlays(folder, backups))]).toEqual([["day4", "boot"]]);
    expect(await foreignOverlays(path("none"), [])).toEqual(new Map());
  });

  it("refuses to remove everything, and two backups of one instant", () => {
    expect(() => decideFiles(days([true]), {})).toThrow(/no rule is given/);
    const [one] = days([true]);
    if (one === undefined) throw new Error();
    expect(() => decideFiles([one, { ...one, file: "other" }], { last: 1 })).toThrow(/another backup/);
  });

  it("takes a circle for no chain", () => {
    const circle = [known("a", START, "b"), known("b", START + 1, "a")];
    expect(chainOf(circle[0], circle)).toBeUndefined();
    expect(chainsOf(circle)).toEqual([]);
  });
});

describe("manifests in a folder", () => {
  async function backup(name: string, value: BackupManifest): Promise<void> {
    writeFileSync(join(folder, name), "data");
    await writeManifest(join(folder, name), value);
  }

  it("are read by job and disk, the oldest first; what is none of ours is passed over", async () => {
    await backup("new.qcow2", manifest(START + DAY_MS, "old.qcow2"));
    await backup("old.qcow2", manifest(START));
    await backup("other.qcow2", manifest(START, null, { disk: "data" }));
    await backup("strange.qcow2", manifest(START, null, { job: "vm2" }));
    await backup("evil.qcow2", manifest(START, "../../etc/passwd"));
    await backup("gone.qcow2", manifest(START - DAY_MS));
    rmSync(join(folder, "gone.qcow2"));
    writeFileSync(join(folder, "text.json"), "{");
    writeFileSync(join(folder, "text"), "");
    const history = await readHistory(folder, "vm1", "root");
    expect(history.map(({ file }) => file)).toEqual(["old.qcow2", "new.qcow2"]);
    expect(await readHistory(join(folder, "none"), "vm1", "root")).toEqual([]);
  });

  it("go with their files, also where a removal was cut off", async () => {
    await backup("a.qcow2", manifest(START));
    const [known_] = await readHistory(folder, "vm1", "root");
    if (known_ === undefined) throw new Error();
    rmSync(known_.path);
    await removeBackup(known_);
    expect(readdirSync(folder)).toEqual([]);
  });

  it("are replaced as a whole", async () => {
    await backup("a.qcow2", manifest(START));
    await backup("a.qcow2", manifest(START, null, { verified: true }));
    expect(JSON.parse(readFileSync(join(folder, "a.qcow2.json"), "utf8"))).toMatchObject({ verified: true });
    expect(readdirSync(folder).sort()).toEqual(["a.qcow2", "a.qcow2.json"]);
  });
});

it("fills patterns", () => {
  const pattern = parsePattern("/b/{group}/{disk}-{date}.qcow2");
  const date = dateWord(new Date("2026-11-28T02:00:00.123Z"));
  expect(fillPattern(pattern, { group: "vm1", disk: "/machine/x[0]", date })).toBe(
    "/b/vm1/_machine_x_0_-2026-11-28T020000Z.qcow2",
  );
  expect(fillPattern(pattern, { group: "g", disk: "..", date })).toBe("/b/g/_-2026-11-28T020000Z.qcow2");
  expect(parsePattern("rbd:pool/{disk}")).toMatchObject({ isFile: false, hasDisk: true });
  expect(() => parsePattern("rbd:pool/{disk}-{date}")).toThrow(/in place/);
});

it("windows go over midnight", () => {
  const at = (hour: number, minute = 0): Date => new Date(2026, 10, 28, hour, minute);
  const night = parseWindow("22:00-06:00");
  expect([21, 22, 23, 0, 5, 6, 12].map((hour) => isInWindow(night, at(hour)))).toEqual([
    false,
    true,
    true,
    true,
    true,
    false,
    false,
  ]);
  const day = parseWindow("08:30-24:00");
  expect([at(8, 29), at(8, 30), at(23, 59), at(0)].map((time) => isInWindow(day, time))).toEqual([
    false,
    true,
    true,
    false,
  ]);
});
