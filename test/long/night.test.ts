// Two nights of three guests, by job files, as the timer starts them: a Linux guest on `serve`, a QEMU with disks of its own by
// --qmp, a machine that is off; beside them a hook that fails, a target that is full and one that hangs. What an
// administrator has of it: files and a repository that verify, a restore that boots, exit codes, JSON, metrics, pings, a mail.
//
// Needs root, for a target of one mebibyte; Debian's kernel for the guest (scripts/guest-kernel.sh); promtool, where there is one.
import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { createServer, type Server as HttpServer } from "node:http";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, expect, it } from "vitest";
import type { RunDocument } from "../../src/cli/actions/run.js";
import { cowcatcher, cowcatcherProcess, run } from "../support/cli.js";
import { bootGuest, findGuestKernel } from "../support/guest-kernel.js";
import { expectSchema } from "../support/json-schema.js";
import { noise } from "../support/disks.js";
import {
  committed,
  contentOf,
  endGuest,
  expectCleanFileSystem,
  filesOf,
  lastNumber,
  makeExt4,
  writingGuest,
} from "../support/numbered-files.js";
import { Qemu } from "../support/qemu.js";
import { flatOf } from "../support/qemu-chain.js";
import { leftovers, mustRun, Process, scratchFolder, Server, stopAll, until } from "../support/server.js";

const MiB = 2 ** 20;
const GUEST_MS = 240_000;
const kernel = findGuestKernel();
const hasPromtool = spawnSync("promtool", ["--version"]).status === 0;

// On a disk, as targets are: the largest part of it is memory's otherwise.
const folder = scratchFolder(tmpdir());
const at = (...names: string[]): string => join(folder, ...names);
const pings: string[] = [];
let monitor: HttpServer;

afterAll(async () => {
  spawnSync("umount", [at("full")]);
  monitor.close();
  await stopAll();
});

function writeJobs(server: Server, qemu: Qemu, ping: string): void {
  mkdirSync(at("jobs.d"));
  const file = (name: string, text: string): void => writeFileSync(at("jobs.d", name), text, { mode: 0o600 });
  file(
    "defaults.yaml",
    `defaults:
  target: ${at("backup")}/{group}/{disk}-{date}.qcow2
  metrics: ${at("metrics")}
  mail: root@example.org
  ping: ${ping}
  hook: [/bin/sh, ${at("hook")}]
`,
  );
  file(
    "guests.yaml",
    `defaults:
  keep: {last: 1}
  verify: true
jobs:
  web:
    control: ${server.control}
  db:
    qmp: ${qemu.monitor}
    disks: [vd0]
    options: {fleece-dir: ${at("fleece")}}
  db-repo:
    qmp: ${qemu.monitor}
    repository: ${at("repo")}
    options: {fleece-dir: ${at("fleece")}}
    lock-wait: 10m
  old:
    image: ${at("old.raw")}
    repository: ${at("repo")}
    lock-wait: 10m
`,
  );
  file(
    "trouble.yaml",
    `jobs:
  hooked: {image: "${at("small.raw")}"}
  full: {image: "${at("small.raw")}", target: "${at("full")}/{date}.qcow2"}
  full-unseen:
    image: ${at("other.raw")}
    target: ${at("full")}/{disk}-{date}.qcow2
    check-space: false
  hung:
    control: ${server.control}
    target: nbd+unix:///?socket=${at("hung.sock")}
    options: {target-format: raw, force: true}
    time-limit: 20s
`,
  );
  // What a hook prints is in the log; one job's fails before its backup.
  writeFileSync(
    at("hook"),
    `echo "$2 $1" >> ${at("phases")}
[ "$1" = job-start ] && echo "hook of $COWCATCHER_JOB"
cat > /dev/null
case $2.$1 in hooked.job-start) echo "no disk" >&2; exit 9;; esac
exit 0
`,
  );
}

async function night(): Promise<RunDocument & { stderr: string }> {
  const { code, stdout, stderr } = await cowcatcherProcess(
    ["run", "--all", "--json", "--parallel", "2", "--config", at("jobs.d")],
    { env: { COWCATCHER_SENDMAIL: at("sendmail") } },
  );
  const document = JSON.parse(stdout) as RunDocument;
  expectSchema("run", document);
  expect(document.exit_code).toBe(code);
  return { ...document, stderr };
}

const jobOf = ({ jobs }: RunDocument, name: string) => {
  const found = jobs.find(({ job }) => job === name);
  if (found === undefined) throw new Error(`no job ${name}`);
  return found;
};

/** What has to be so after every night. */
function expectTrouble(document: RunDocument): void {
  expect(jobOf(document, "hooked")).toMatchObject({
    ...{ result: "failed", exit_code: 1, tries: 0, disks: [] },
    error: { problem: "the hook of job-start ended with exit code 9" },
  });
  expect(jobOf(document, "full")).toMatchObject({ exit_code: 1, tries: 0, error: { code: "NO_SPACE" } });
  expect(jobOf(document, "full-unseen")).toMatchObject({
    exit_code: 1,
    tries: 1,
    error: { code: "NO_SPACE" },
  });
  expect(jobOf(document, "hung")).toMatchObject({ exit_code: 1, tries: 1, error: { code: "LIMIT" } });
  expect(document.exit_code).toBe(1);
  expect(readdirSync(at("full"))).toEqual([]);
}

/** The files that the guest had committed before T0 are in the image; none that it began after the run is. */
async function expectFiles(backup: string, name: string, from: number, to: number): Promise<void> {
  const raw = at(`${name}.raw`);
  const restored = await cowcatcher(["restore", "-O", "raw", backup, raw]);
  expect(restored).toMatchObject({ code: 0, stderr: "" });
  await mustRun("e2fsck", "-y", "-E", "journal_only", raw);
  await expectCleanFileSystem(raw);
  const files = await filesOf(raw, at(name));
  for (let number = 1; number <= from; number++)
    expect(files.get(number), `file${number}`).toBe(contentOf(number));
  expect(Math.max(...files.keys())).toBeLessThanOrEqual(to);
}

const phasesOf = (job: string): string[] =>
  (existsSync(at("phases")) ? readFileSync(at("phases"), "utf8") : "")
    .trim()
    .split("\n")
    .flatMap((line) => (line.startsWith(`${job} `) ? [line.slice(job.length + 1)] : []));

/** One that nobody has at this moment. */
async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((settle) => server.listen(0, "127.0.0.1", settle));
  const { port } = server.address() as AddressInfo;
  await new Promise((settle) => server.close(settle));
  return port;
}

const filesIn = (group: string): string[] =>
  readdirSync(at("backup", group))
    .filter((name) => name.endsWith(".qcow2"))
    .sort();

it.skipIf(process.getuid?.() !== 0)("two nights of three guests", async ({ skip }) => {
  if ("missing" in kernel) return skip(kernel.missing);
  for (const name of ["full", "fleece", "metrics", "sockets"]) mkdirSync(at(name));
  await mustRun("mount", "-t", "tmpfs", "-o", "size=1M", "none", at("full"));
  writeFileSync(at("sendmail"), `#!/bin/sh\necho "$@" >> ${at("mail.args")}\ncat >> ${at("mails")}\n`, {
    mode: 0o755,
  });
  writeFileSync(at("old.raw"), noise(12 * MiB));
  writeFileSync(at("small.raw"), noise(4 * MiB));
  writeFileSync(at("other.raw"), noise(4 * MiB));
  expect((await cowcatcher(["repo", "init", at("repo")])).code).toBe(0);
  monitor = createServer((request, response) => {
    pings.push(request.url?.replace(/\?.*/, "") ?? "");
    request.resume().on("end", () => response.end());
  });
  await new Promise<void>((settle) => monitor.listen(0, "127.0.0.1", settle));
  const ping = `http://127.0.0.1:${(monitor.address() as AddressInfo).port}/night`;
  // It takes everything but data.
  new Process("nbdkit", [
    ...[
      "-f",
      "-U",
      at("hung.sock"),
      "eval",
      "get_size=echo 67108864",
      "pread=dd if=/dev/zero count=$3 iflag=count_bytes",
    ],
    ...[
      "can_write=exit 0",
      "pwrite=cat > /dev/null; while kill -0 $PPID; do sleep 1; done",
      "can_flush=exit 0",
      "flush=exit 0",
    ],
  ]);

  await makeExt4(at("web.raw"), 64 * MiB);
  const metricsAddress = `127.0.0.1:${await freePort()}`;
  const server = await Server.start(folder, [`${at("web.raw")}=root`], {
    args: ["-f", "raw", "--metrics", metricsAddress],
  });
  const web = await bootGuest(kernel, {
    ...{
      script: writingGuest("sleep 0.1"),
      initramfs: at("initramfs"),
      socket: server.socket,
      exportName: "root",
    },
  });
  mkdirSync(at("qemu"));
  const qemu = await Qemu.start(at("qemu"), { format: "qcow2", running: true });
  await qemu.fill();
  const qemuBefore = await qemu.state();
  qemu.startWriting();
  writeJobs(server, qemu, ping);

  // The first night: full backups.
  const before1 = await committed(web, 20, GUEST_MS);
  const firstNight = night();
  // While a target hangs, its guest goes on.
  await until("T0 of the backup to the target that hangs", () => phasesOf("hung").includes("thaw"), GUEST_MS);
  await committed(web, 3, GUEST_MS);
  expect(phasesOf("hung")).not.toContain("backup-abort");
  const first = await firstNight;
  const after1 = lastNumber(web, "committed") + 1;
  expectTrouble(first);
  for (const name of ["web", "db", "db-repo", "old"]) {
    expect(jobOf(first, name), name).toMatchObject({
      result: "done",
      exit_code: 0,
      level: "full",
      verified: true,
    });
  }
  const webFull = jobOf(first, "web").disks[0]?.target ?? "";
  await expectFiles(webFull, "restored1", before1, after1);
  const dbEarliest = qemu.instantOf([await flatOf(jobOf(first, "db").disks[0]?.target ?? "")], 1);
  expect(dbEarliest).toBeGreaterThan(0);

  // The day: changes everywhere.
  await mustRun("qemu-io", "-f", "raw", "-c", "write -P 9 3M 64k", at("old.raw"));
  await qemu.progress(50);

  // The second night: what has changed.
  const before2 = await committed(web, 10, GUEST_MS);
  const second = await night();
  const after2 = lastNumber(web, "committed") + 1;
  expectTrouble(second);
  expect(jobOf(second, "web")).toMatchObject({ result: "done", level: "incremental" });
  expect(jobOf(second, "db")).toMatchObject({ result: "done", level: "incremental" });
  expect(jobOf(second, "old")).toMatchObject({ result: "done" });
  expect(jobOf(second, "old").disks[0]?.bytes_written).toBeLessThan(4 * MiB);
  expect(jobOf(second, "db-repo")).toMatchObject({ result: "done", level: "incremental", verified: true });
  await qemu.stopWriting();

  // Retention: of files the chain, of the repository the older backup, which is pruned.
  expect(filesIn("web")).toHaveLength(2);
  expect(filesIn("db")).toHaveLength(2);
  expect(jobOf(second, "old").removed).toHaveLength(1);
  expect(jobOf(second, "web").removed).toEqual([]);
  for (const group of ["web", "db"]) expect(leftovers(at("backup", group))).toEqual([]);

  // Nothing is left in QEMU but the bitmaps of the last backups: one of the file, one of the group in the repository.
  expect(await qemu.state()).toEqual(qemuBefore);
  expect(readdirSync(at("fleece"))).toEqual([]);
  const nodes = JSON.stringify(await qemu.execute("query-named-block-nodes", { flat: true }));
  const bitmaps = [...new Set(nodes.match(/cowcatcher-bitmap-[0-9a-f-]+/g))].map(
    (name) => name.split("-").length,
  );
  expect(bitmaps.sort()).toEqual([3, 4]);

  // The data: each backup is an instant.
  const webLast = jobOf(second, "web").disks[0]?.target ?? "";
  await expectFiles(webLast, "restored2", before2, after2);
  expect(
    qemu.instantOf([await flatOf(jobOf(second, "db").disks[0]?.target ?? "")], dbEarliest),
  ).toBeGreaterThan(dbEarliest);
  expect(
    (await cowcatcher(["restore", `${at("repo")}::old`, "-O", "raw", at("old-restored.raw")])).code,
  ).toBe(0);
  expect(readFileSync(at("old-restored.raw")).equals(readFileSync(at("old.raw")))).toBe(true);
  expect(
    (await cowcatcher(["restore", `${at("repo")}::db-repo`, "-O", "raw", at("db-restored.raw")])).code,
  ).toBe(0);
  expect(qemu.instantOf([at("db-restored.raw")], 1)).toBeGreaterThan(0);
  expect(await cowcatcher(["repo", "verify", at("repo")])).toMatchObject({ code: 0 });
  expect((await cowcatcher(["repo", "prune", at("repo"), "--dry-run"])).stdout).toMatch(
    /; 0 \(0 B\) would be freed/,
  );

  // Hooks, pings, mail, metrics.
  expect(phasesOf("hooked")).toEqual([
    ...["job-init", "job-start", "job-abort", "log-end", "job-init", "job-start", "job-abort", "log-end"],
  ]);
  expect(phasesOf("web").slice(0, 7)).toEqual([
    ...["job-init", "job-start", "backup-start", "thaw", "backup-end", "job-end", "log-end"],
  ]);
  expect(first.stderr).toMatch(/web: hook job-start: hook of web\n/);
  expect(first.stderr).toMatch(/hooked: hook job-start: no disk\n/);
  const count = (path: string): number => pings.filter((one) => one === path).length;
  expect([count("/night/start"), count("/night"), count("/night/fail")]).toEqual([16, 8, 8]);
  const mails = readFileSync(at("mails"), "utf8");
  expect(readFileSync(at("mail.args"), "utf8")).toBe("-t -i\n-t -i\n");
  expect(mails.match(/^Subject: cowcatcher on .*: 4 of 4 failed$/gm)).toHaveLength(2);
  for (const job of ["hooked", "full", "full-unseen", "hung"])
    expect(mails).toMatch(new RegExp(`^${job} +failed \\(1\\)`, "m"));
  expect(mails).toContain("hook job-start: no disk");
  const metric = (job: string, name: string): number => {
    const text = readFileSync(at("metrics", `cowcatcher-${job}.prom`), "utf8");
    return Number(new RegExp(`^cowcatcher_backup_${name}\\{[^}]*\\} (\\S+)$`, "m").exec(text)?.[1]);
  };
  expect(metric("web", "incremental")).toBe(1);
  expect(metric("web", "last_exit_code")).toBe(0);
  expect(metric("hung", "last_exit_code")).toBe(1);
  expect(metric("hung", "last_success_timestamp_seconds")).toBeNaN();
  const served = await (await fetch(`http://${metricsAddress}/metrics`)).text();
  const ended = (result: string): number =>
    Number(
      new RegExp(`^cowcatcher_jobs_ended_total\\{disk="root",result="${result}"\\} (\\d+)$`, "m").exec(
        served,
      )?.[1],
    );
  // Those of `hung` came to their time limit.
  expect([ended("done"), ended("failed"), ended("cancelled")]).toEqual([2, 0, 2]);
  expect(served).toMatch(/^cowcatcher_guest_wait_seconds_bucket\{disk="root",le="\+Inf"\} \d+$/m);
  if (hasPromtool) {
    const checked = await run("promtool", ["check", "metrics"], { input: served });
    expect(checked).toMatchObject({ code: 0, stdout: "", stderr: "" });
    for (const name of readdirSync(at("metrics"))) {
      const checked = await run("promtool", ["check", "metrics"], {
        input: readFileSync(at("metrics", name), "utf8"),
      });
      expect(checked, name).toMatchObject({ code: 0, stdout: "", stderr: "" });
    }
  }

  // The last backup boots: Linux finds its file system and what was committed.
  await endGuest(web, GUEST_MS);
  await server.stop();
  mkdirSync(at("boot"));
  expect((await cowcatcher(["restore", "-O", "raw", webLast, at("boot", "web.raw")])).code).toBe(0);
  const restored = await Server.start(at("boot"), [`${at("boot", "web.raw")}=root`], { args: ["-f", "raw"] });
  const script = `mount -t ext4 /dev/vda /mnt && echo "guest: has $(ls /mnt | grep -c file)" && echo "guest: reads" $(cat /mnt/file${before2}); umount /mnt`;
  const booted = await bootGuest(kernel, {
    ...{ script, initramfs: at("boot", "initramfs"), socket: restored.socket, exportName: "root" },
  });
  const has = await booted.line((line) => line.startsWith("guest: has"), 0, GUEST_MS);
  expect(Number(/\d+/.exec(has)?.[0])).toBeGreaterThanOrEqual(before2);
  await booted.line((line) => line === `guest: reads ${before2}`, 0, GUEST_MS);
  await booted.end(GUEST_MS);
});
