// Storage that holds whoever writes to it in the kernel, as NFS without its server does: a file system that is frozen. The
// other jobs of the night are made all the same, and the run ends.
//
// Needs root, for a file system of its own. Takes the two minutes after which a process is left behind.
import { spawnSync } from "node:child_process";
import { mkdirSync, readdirSync, readFileSync, realpathSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, expect, it } from "vitest";
import type { RunDocument } from "../../src/cli/actions/run.js";
import { lockFolder, Locks } from "../../src/run/locks.js";
import { cowcatcherProcess } from "../support/cli.js";
import { noise } from "../support/disks.js";
import { mustRun, scratchFolder, stopAll, until } from "../support/server.js";

const isRoot = process.getuid?.() === 0;
const folder = scratchFolder(tmpdir());
const at = (...names: string[]): string => join(folder, ...names);

beforeAll(async () => {
  if (!isRoot) return;
  mkdirSync(at("target"));
  await mustRun("truncate", "-s", "64M", at("target.img"));
  await mustRun("mkfs.ext4", "-q", at("target.img"));
  await mustRun("mount", "-o", "loop", at("target.img"), at("target"));
  mkdirSync(at("target", "a"));
  writeFileSync(at("disk.raw"), noise(2 ** 20));
  writeFileSync(at("other.raw"), noise(2 ** 20));
  writeFileSync(
    at("freeze"),
    `cat > /dev/null; [ $1 = backup-start ] && fsfreeze -f ${at("target")}; exit 0`,
  );
});
afterAll(async () => {
  if (!isRoot) return;
  spawnSync("fsfreeze", ["-u", at("target")]);
  spawnSync("umount", [at("target")]);
  await stopAll();
});

async function night(): Promise<RunDocument> {
  const { stdout } = await cowcatcherProcess(["run", "--all", "--json", "--config", at("jobs.yaml")]);
  return JSON.parse(stdout) as RunDocument;
}

const writeJobs = (hook: string): void =>
  writeFileSync(
    at("jobs.yaml"),
    `jobs:
  a: {image: ${at("disk.raw")}, target: "${at("target")}/{group}/{date}.raw", time-limit: 3s${hook}}
  b: {image: ${at("other.raw")}, target: "${at("good")}/{date}.raw"}
`,
    { mode: 0o600 },
  );

it.skipIf(!isRoot)("a target that hangs in the middle of a backup does not hang the night", async () => {
  writeJobs(`, hook: [/bin/sh, ${at("freeze")}]`);
  const first = await night();
  expect(first.jobs).toMatchObject([
    { job: "a", result: "failed", exit_code: 1, tries: 1, error: { code: "LIMIT" } },
    { job: "b", result: "done", exit_code: 0 },
  ]);

  // It hangs before the backup now: the guest would not be touched. What was left behind has the job's lock.
  const second = await night();
  expect(second.jobs).toMatchObject([
    { job: "a", result: "failed", exit_code: 10, tries: 0, error: { code: "LOCKED" } },
    { job: "b", result: "done" },
  ]);

  // The storage answers: what was left behind ends, and leaves no backup.
  await mustRun("fsfreeze", "-u", at("target"));
  const locks = new Locks(lockFolder());
  const isFree = async (): Promise<boolean> => {
    try {
      await (await locks.take([`the disk ${realpathSync(at("disk.raw"))}`], 0)).release();
      return true;
    } catch {
      return false;
    }
  };
  await until("the end of what was left behind", isFree, 60_000);
  expect(readdirSync(at("target", "a")).filter((name) => name.endsWith(".raw"))).toEqual([]);

  await mustRun("fsfreeze", "-f", at("target"));
  writeJobs("");
  const third = await night();
  expect(third.jobs).toMatchObject([
    { job: "a", result: "failed", tries: 1, error: { code: "IO", object: at("target", "a") } },
    { job: "b", result: "done" },
  ]);
  expect(third.jobs[0]?.error?.problem).toBe("its storage has not answered within 3 s");

  await mustRun("fsfreeze", "-u", at("target"));
  const fourth = await night();
  expect(fourth.exit_code).toBe(0);
  const file = fourth.jobs[0]?.disks[0]?.target ?? "";
  expect(readFileSync(file).equals(readFileSync(at("disk.raw")))).toBe(true);
});
