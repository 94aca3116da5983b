// A job from its first hook to its last, with a program in cowcatcher's place that does as it is told.
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  watch,
  writeFileSync,
} from "node:fs";
import { createServer, type Server } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { CowcatcherError } from "../../../src/errors.js";
import { readJobFile } from "../../../src/run/file/parse.js";
import { resolveJob } from "../../../src/run/file/resolve.js";
import type { Job } from "../../../src/run/job.js";
import { Locks } from "../../../src/run/locks.js";
import type { JobResult } from "../../../src/run/result.js";
import { worstExitCode } from "../../../src/run/result.js";
import { runJob } from "../../../src/run/run-job.js";
import { type FinishedJob, runJobs } from "../../../src/run/run-jobs.js";
import { until } from "../../support/server.js";
import { FakeCowcatcher, failure, summary } from "../../support/fake-cowcatcher.js";

let folder: string;
let fake: FakeCowcatcher;
let interruption: AbortController;
let clock: Date;
const at = (name: string): string => join(folder, name);

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "cowcatcher-run-"));
  fake = new FakeCowcatcher(folder);
  interruption = new AbortController();
  clock = new Date("2026-11-28T02:00:00.000Z");
  writeFileSync(at("disk.raw"), "x");
});
afterEach(() => rmSync(folder, { recursive: true, force: true }));

/** The job of YAML lines; a source and a target unless they are among them. */
function job(...lines: string[]): Job {
  const has = (key: string): boolean => lines.some((line) => line.startsWith(`${key}:`));
  const own = [
    ...(["image", "control", "qmp", "libvirt"].some(has) ? [] : [`image: ${at("disk.raw")}`]),
    ...(has("target") || has("repository") ? [] : [`target: "${at("b/{disk}-{date}.qcow2")}"`]),
    "check-space: false",
    ...lines,
  ];
  const { jobs, faults } = readJobFile(
    "f",
    `jobs:\n  vm1:\n${own.map((line) => `    ${line}`).join("\n")}\n`,
  );
  expect(faults).toEqual([]);
  const [read] = jobs;
  const resolved = read === undefined ? undefined : resolveJob(read, []);
  if (resolved === undefined || "problem" in resolved) throw new Error(JSON.stringify(resolved));
  return resolved;
}

const settings = () => ({
  program: fake.program,
  version: "1",
  isFull: false,
  locks: new Locks(at("locks")),
  signal: interruption.signal,
  onLine: () => undefined,
  now: () => clock,
  // Nobody is at the sockets that these jobs name.
  sourceCheck: () => Promise.resolve(),
});

const run = async (one: Job): Promise<JobResult> => (await runJob(one, settings())).result;

/** A hook that writes down its phases and what it is told, and fails in those named. */
function hook(...failing: string[]): string {
  writeFileSync(
    at("hook.sh"),
    `echo "$1${"$"}{COWCATCHER_ERROR:+ error}" >> ${at("phases")}\n` +
      `cat > ${at("document")}\ncase " ${failing.join(" ")} " in *" $1 "*) echo "no good" >&2; exit 3;; esac\n`,
  );
  return `hook: [/bin/sh, ${at("hook.sh")}]`;
}
const phases = (): string[] => readFileSync(at("phases"), "utf8").trim().split("\n");

describe("phases", () => {
  const made = { command: "backup", stdout: [summary()], writesTargets: true };

  it("of a good job, with the result and the log at the end", async () => {
    fake.answer([made]);
    expect(await run(job(hook()))).toMatchObject({ result: "done", exit_code: 0, tries: 1, error: null });
    expect(phases()).toEqual(["job-init", "job-start", "backup-start", "backup-end", "job-end", "log-end"]);
    const document = JSON.parse(readFileSync(at("document"), "utf8")) as { phase: string; log: string[] };
    expect(document).toMatchObject({
      phase: "log-end",
      job: "vm1",
      result: "done",
      disks: [{ disk: "disk" }],
    });
  });

  it("are told of the job in their environment, the plan as soon as there is one", async () => {
    writeFileSync(
      at("hook.sh"),
      `case $1 in job-init|backup-end) env | grep ^COWCATCHER_ | sort > ${at("env")}.$1;; esac\n`,
    );
    fake.answer([made]);
    await run(job("group: web", `hook: [/bin/sh, ${at("hook.sh")}]`));
    const told = (phase: string): string[] =>
      readFileSync(at(`env.${phase}`), "utf8").match(
        /^COWCATCHER_(?:DISKS|ERROR|GROUP|JOB|LEVEL|PHASE|TARGETS)=.*$/gm,
      ) ?? [];
    const of = (phase: string, disks: string, level: string, targets: string): string[] =>
      [
        ...[`DISKS=${disks}`, "ERROR=", "GROUP=web", "JOB=vm1", `LEVEL=${level}`, `PHASE=${phase}`],
        `TARGETS=${targets}`,
      ].map((pair) => `COWCATCHER_${pair}`);
    expect(told("job-init")).toEqual(of("job-init", "", "", ""));
    const target = at("b/disk-2026-11-28T020000Z.qcow2");
    expect(told("backup-end")).toEqual(of("backup-end", "disk", "full", target));
  });

  it.each([
    [["job-init"], ["job-init", "job-abort error", "log-end error"]],
    [["job-start"], ["job-init", "job-start", "job-abort error", "log-end error"]],
    [
      ["backup-start", "backup-abort", "job-abort", "log-end"],
      ["job-init", "job-start", "backup-start", "backup-abort error", "job-abort error", "log-end error"],
    ],
    [
      ["backup-end"],
      [
        "job-init",
        "job-start",
        "backup-start",
        "backup-end",
        "backup-abort error",
        "job-abort error",
        "log-end error",
      ],
    ],
    [
      ["job-end"],
      ["job-init", "job-start", "backup-start", "backup-end", "job-end", "job-abort error", "log-end error"],
    ],
  ])("where the hook fails in %j, what cleans up comes all the same", async (failing, expected) => {
    fake.answer([made]);
    const result = await run(job(hook(...failing)));
    expect(result).toMatchObject({ result: "failed", exit_code: 1 });
    expect(result.error?.problem).toBe(`the hook of ${failing[0]} ended with exit code 3`);
    expect(phases()).toEqual(expected);
    // No later failure takes the first one's place.
    expect(result.warnings).toHaveLength(failing.length - 1);
  });

  const guest = ["qmp: /run/q", "disks: [root]", "freeze: /run/qga"];
  const asks = { command: "backup", stdout: [summary()], writesTargets: true, asksGate: true };

  it("of a guest that is frozen have t0 before T0, and thaw while the backup goes on", async () => {
    fake.answer([asks]);
    expect(await run(job(...guest, hook()))).toMatchObject({ result: "done", exit_code: 0 });
    expect(phases()).toEqual([
      ...["job-init", "job-start", "backup-start", "t0", "thaw", "backup-end", "job-end", "log-end"],
    ]);
    expect(fake.calls[0]).toMatch(/ --t0-gate=\S+ .*--freeze=\/run\/qga /);
    expect(existsSync(/--t0-gate=(\S+)/.exec(fake.calls[0] ?? "")?.[1] ?? folder)).toBe(false);
  });

  it.each([
    [["t0"], ["backup-start", "t0", "thaw error", "backup-abort error"]],
    [["backup-start"], ["backup-start", "thaw error", "backup-abort error"]],
    [["thaw"], ["backup-start", "t0", "thaw", "backup-end"]],
  ])("of a guest where the hook fails in %j: thaw comes once, whatever failed", async (failing, expected) => {
    fake.answer([asks]);
    const result = await run(job(...guest, hook(...failing)));
    expect(phases().filter((phase) => !/^(job|log)/.test(phase))).toEqual(expected);
    const problem = `the hook of ${failing[0]} ended with exit code 3`;
    if (failing[0] === "thaw") {
      expect(result).toMatchObject({ result: "done", exit_code: 0 });
      expect(result.warnings).toEqual([expect.stringContaining(problem)]);
    } else expect(result).toMatchObject({ exit_code: 1, error: { problem } });
  });

  it("of a guest that is not frozen have no t0, and thaw after a backup that came to no T0", async () => {
    fake.answer([{ command: "backup", exitCode: 1, stdout: [failure("IO", "is slow")] }]);
    expect(await run(job(...guest.slice(0, 2), hook()))).toMatchObject({ exit_code: 1 });
    expect(phases().slice(2, 5)).toEqual(["backup-start", "thaw error", "backup-abort error"]);
  });

  it("of a hook that hangs end with it, and with what it has started", async () => {
    writeFileSync(at("hook.sh"), `[ "$1" = job-init ] || exit 0\nsleep 600 & sleep 600\n`);
    const result = await run(job(`hook: [/bin/sh, ${at("hook.sh")}]`, "hook-timeout: 100ms"));
    expect(result.error?.problem).toBe("the hook of job-init took longer than 100 ms");
    expect(fake.calls).toEqual([]);
  });

  it("that clean up come after one another, also where the hook hangs in each of them", async () => {
    const hung = ["thaw", "backup-abort", "job-abort", "log-end"];
    writeFileSync(
      at("hook.sh"),
      `echo "$1" >> ${at("phases")}\ncase " ${hung.join(" ")} " in *" $1 "*) sleep 600;; esac\n`,
    );
    fake.answer([{ command: "backup", exitCode: 1, stdout: [failure("IO", "is slow")] }]);
    const lines = [...guest, `hook: [/bin/sh, ${at("hook.sh")}]`, "hook-timeout: 150ms"];
    const result = await run(job(...lines));
    expect(result).toMatchObject({ exit_code: 1, error: { message: "disk: is slow" } });
    expect(phases()).toEqual(["job-init", "job-start", "backup-start", ...hung]);
    const ends = hung.map((phase) => `/bin/sh: the hook of ${phase} took longer than 150 ms`);
    expect(result.warnings).toEqual(ends);
  });

  it("that do not clean up end with an interruption, which those that do outlast", async () => {
    writeFileSync(
      at("hook.sh"),
      `echo "$1" >> ${at("phases")}\n[ "$1" = job-init ] && : > ${at("waiting")} && sleep 600\nexit 0\n`,
    );
    const running = run(job(`hook: [/bin/sh, ${at("hook.sh")}]`));
    await until("job-init", () => existsSync(at("waiting")), 60_000);
    interruption.abort();
    expect(await running).toMatchObject({
      exit_code: 143,
      error: { problem: "the hook of job-init was ended, as the run was interrupted" },
    });
    expect(phases()).toEqual(["job-init", "job-abort", "log-end"]);
  });

  it("of a hook that is not there fail the job", async () => {
    expect(await run(job("hook: /none"))).toMatchObject({ exit_code: 1, error: { object: "/none" } });
  });
});

/** Of `serve`'s control socket, as much as tells disks. */
function serverWithDisks(...names: string[]): Server {
  return createServer((socket) => {
    socket.on("error", () => undefined);
    socket.write('{"QMP":{"version":{},"capabilities":[]}}\n');
    socket.setEncoding("utf8").on("data", (text: string) => {
      for (const line of text.trim().split("\n")) {
        const { execute, id } = JSON.parse(line) as { execute: string; id: number };
        const nodes = names.map((name) => ({ "node-name": name }));
        const answer = execute === "query-named-block-nodes" ? nodes : {};
        socket.write(`${JSON.stringify({ return: answer, id })}\n`);
      }
    });
  });
}

describe("tries", () => {
  const failed = { command: "backup", exitCode: 1, stdout: [failure("IO", "is slow")], once: true };

  it("are made again after a failure that may pass, as often as asked for", async () => {
    fake.answer([failed, failed, { command: "backup", stdout: [summary()], writesTargets: true }]);
    const result = await run(job("retries: 2", "retry-wait: 1ms", hook()));
    expect(result).toMatchObject({ result: "done", exit_code: 0, tries: 3, error: null });
    expect(phases().filter((phase) => phase.startsWith("backup"))).toEqual([
      "backup-start",
      "backup-abort error",
      "backup-start",
      "backup-abort error",
      "backup-start",
      "backup-end",
    ]);
    fake.answer([failed, failed, failed]);
    expect(await run(job("retries: 1", "retry-wait: 1ms"))).toMatchObject({
      ...{ result: "failed", exit_code: 1, tries: 2 },
      error: { message: "disk: is slow" },
    });
  });

  it.each([2, 4, 11, 12])("are not made again after exit code %i", async (exitCode) => {
    fake.answer([{ command: "backup", exitCode, stdout: [failure("USAGE", "is wrong")] }]);
    expect(await run(job("retries: 3"))).toMatchObject({ exit_code: exitCode, tries: 1 });
  });

  it("end with the time limit", async () => {
    fake.answer([{ command: "backup", hangs: true }]);
    const result = await run(job("time-limit: 300ms"));
    expect(result).toMatchObject({ exit_code: 1, error: { code: "LIMIT" } });
  });

  it("end with an interruption, which begins nothing more, and cleans up", async () => {
    fake.answer([{ command: "backup", hangs: true }]);
    const isWaiting = new Promise<void>((settle) => {
      const watcher = watch(folder, () => {
        if (!existsSync(at("waiting"))) return;
        watcher.close();
        settle();
      });
    });
    const running = run(job("retries: 5", hook()));
    await isWaiting;
    interruption.abort();
    expect(await running).toMatchObject({ result: "failed", exit_code: 143, tries: 1 });
    expect(phases().slice(-3)).toEqual(["backup-abort error", "job-abort error", "log-end error"]);
    expect(fake.calls).toHaveLength(1);
  });

  it("are none after an interruption, and no hook of a job is run that was not begun", async () => {
    interruption.abort();
    const started: string[] = [];
    const [one] = await runJobs([job(hook())], {
      ...settings(),
      parallel: 1,
      onStarted: ({ name }) => Promise.resolve(void started.push(name)),
    });
    expect(one?.result).toMatchObject({ result: "failed", exit_code: 143, tries: 0 });
    expect([existsSync(at("phases")), fake.calls, started]).toEqual([false, [], []]);
  });

  it("are made again while the server does not tell its disks yet", async () => {
    const source = [
      `control: ${at("control")}`,
      "retry-wait: 1ms",
      `target: "${at("b/{disk}-{date}.qcow2")}"`,
    ];
    expect(await run(job(...source, "retries: 2", hook()))).toMatchObject({
      ...{ result: "failed", exit_code: 1, tries: 3 },
      error: { code: "NOT_FOUND", object: at("control") },
    });
    expect(phases()).toEqual(["job-init", "job-abort error", "log-end error"]);
    fake.answer([{ command: "backup", stdout: [summary(), summary()] }]);
    const server = serverWithDisks("root", "data");
    // It begins to listen when it has been asked in vain.
    const onLine = (): void => void (server.listening || server.listen(at("control")));
    const { result } = await runJob(job(...source, "retries: 100"), { ...settings(), onLine });
    server.close();
    expect(result).toMatchObject({ result: "done", exit_code: 0, error: null });
    expect(result.tries).toBeGreaterThan(1);
    expect(fake.calls[0]).toContain("--disk root --disk data");
  });

  it("have failed without a result, whatever the exit code", async () => {
    fake.answer([{ command: "backup" }]);
    expect(await run(job())).toMatchObject({
      ...{ result: "failed", exit_code: 1 },
      error: { problem: "the backup ended without a result" },
    });
  });

  it("say what ended a backup that said nothing", async () => {
    fake.answer([{ command: "backup", exitCode: 7 }]);
    expect(await run(job())).toMatchObject({
      error: { problem: "ended with exit code 7, and said nothing of it" },
    });
  });
});

describe("chains", () => {
  const source = "control: /run/c";
  const good = { command: "backup", stdout: [summary(), summary()], writesTargets: true };
  const noBasis = {
    command: "backup",
    exitCode: 12,
    stdout: [failure("NO_BASIS", "no checkpoint")],
    once: true,
  };
  const chain = (...lines: string[]): Job => job(source, "disks: [root, data]", ...lines);

  async function night(...lines: string[]): Promise<JobResult> {
    const result = await run(chain(...lines));
    clock = new Date(clock.getTime() + 86_400_000);
    return result;
  }

  it("go on from the last backup of all disks, and end when they are old", async () => {
    const answer = (t0: string) =>
      fake.answer([
        { ...good, stdout: [summary({ t0 }), summary({ t0 })] },
        { command: "checkpoints", stdout: [] },
      ]);
    const results: JobResult[] = [];
    for (let day = 0; day < 4; day++) {
      answer(clock.toISOString());
      results.push(await night("full-every: 3d", "keep: {last: 2}"));
      if (day === 1) {
        expect(fake.calls).toContainEqual(
          "backup --no-progress --checkpoint run.vm1.2026-11-29T020000Z --since run.vm1.2026-11-28T020000Z " +
            "-b root-2026-11-28T020000Z.qcow2 -b data-2026-11-28T020000Z.qcow2 -B qcow2 -O qcow2 " +
            `--control /run/c --disk root --disk data ${at("b/root-2026-11-29T020000Z.qcow2")} ${at("b/data-2026-11-29T020000Z.qcow2")}`,
        );
      }
    }
    expect(results.map(({ level }) => level)).toEqual(["full", "incremental", "incremental", "full"]);
    expect(results[3]?.level_reason).toBe("the last full one is older than full-every");
    expect(results.map(({ removed }) => removed.length)).toEqual([0, 0, 0, 0]);
    answer(clock.toISOString());
    const last = await night("full-every: 3d", "keep: {last: 1}");
    expect(last).toMatchObject({ level: "incremental" });
    // Six of the first chain, and those that are kept: the full ones are needed by the new ones.
    expect(last.removed).toHaveLength(6);
    expect(readdirSync(at("b")).filter((name) => name.endsWith(".qcow2"))).toHaveLength(4);
  });

  it("by QEMU's bitmaps build on the last file, and end its bitmap where they begin anew", async () => {
    const qemu = async (...lines: string[]): Promise<JobResult> => {
      const t0 = clock.toISOString();
      const result = await run(job("qmp: /run/q", "disks: [root, data]", "verify: true", ...lines));
      expect(result.error).toBe(null);
      expect(result.disks.every((disk) => disk.t0 === t0)).toBe(true);
      clock = new Date(clock.getTime() + 86_400_000);
      return result;
    };
    const answer = () =>
      fake.answer([
        { command: "backup --qmp /run/q --cleanup" },
        { ...good, stdout: [summary({ t0: clock.toISOString() }), summary({ t0: clock.toISOString() })] },
      ]);
    answer();
    expect(await qemu()).toMatchObject({ level: "full" });
    expect(fake.calls[0]).toMatch(/^backup --no-progress --bitmap auto --verify --qmp \/run\/q --disk root /);
    answer();
    expect(await qemu()).toMatchObject({ level: "incremental" });
    expect(fake.calls[0]).toMatch(
      /^backup --no-progress --bitmap auto -b root-2026-11-28T020000Z.qcow2 -b data-2026-11-28T020000Z.qcow2 -B qcow2 -O qcow2 --bitmap-keeps-base --qmp /,
    );
    // The base's bitmap goes when the next backup has been looked at, and not before.
    const ends = (day: number): string =>
      ["root", "data"]
        .map((disk) => `--bitmap-replaces ${at(`b/${disk}-2026-11-${day}T020000Z.qcow2`)}`)
        .join(" ");
    expect(fake.calls.slice(1)).toEqual([
      ...["root", "data"].map((disk) => `check ${at(`b/${disk}-2026-11-29T020000Z.qcow2`)}`),
      `backup --qmp /run/q --cleanup ${ends(28)}`,
    ]);
    answer();
    expect(await qemu("full-every: 2d")).toMatchObject({ level: "full" });
    const last = (disk: string): string => `--bitmap-replaces ${at(`b/${disk}-2026-11-29T020000Z.qcow2`)}`;
    expect(fake.calls[0]).toContain(`--bitmap auto ${last("root")} ${last("data")} --verify`);
    // The same of a domain of libvirt's.
    answer();
    const domain = ["libvirt: vm1", "connect: qemu:///session", "disks: [root, data]"];
    expect(await run(job(...domain))).toMatchObject({ level: "incremental", error: null });
    expect(fake.calls[0]).toMatch(
      /^backup --no-progress --bitmap auto -b root-\S+ -b data-\S+ -B qcow2 -O qcow2 --libvirt vm1 --connect qemu:\/\/\/session --disk root --disk data /,
    );
    clock = new Date(clock.getTime() + 86_400_000);
    // A disk of which QEMU keeps no bitmap: each is a full one, with the reason.
    fake.answer([
      noBasis,
      { ...noBasis, once: true },
      { ...good, stdout: [summary({ t0: clock.toISOString() }), summary({ t0: clock.toISOString() })] },
    ]);
    expect(await qemu()).toMatchObject({ level: "full", level_reason: "no checkpoint", tries: 1 });
    expect(
      fake.calls
        .filter((call) => call.startsWith("backup"))
        .map((call) => /--bitmap auto( -b)?/.exec(call)?.[0]),
    ).toEqual(["--bitmap auto -b", "--bitmap auto", undefined]);
  });

  it("by QEMU's bitmaps go on from the last good file where the next one is damaged", async () => {
    const qemu = (): Promise<JobResult> => run(job("qmp: /run/q", "disks: [root]", "verify: true"));
    const made = { ...good, stdout: [summary({ t0: clock.toISOString() })] };
    const cleanup = { command: "backup --qmp /run/q --cleanup" };
    fake.answer([made]);
    expect(await qemu()).toMatchObject({ level: "full", error: null });
    clock = new Date(clock.getTime() + 86_400_000);
    fake.answer([
      cleanup,
      made,
      { command: "check", exitCode: 2, stdout: [failure("FORMAT", "is corrupt")] },
    ]);
    expect(await qemu()).toMatchObject({
      level: "incremental",
      result: "failed",
      error: { problem: "is corrupt" },
    });
    const bad = at("b/root-2026-11-29T020000Z.qcow2");
    // The backup stays, for whoever wants to look at it; its bitmap does not.
    expect(fake.calls.slice(1)).toEqual([
      `check ${bad}`,
      `backup --qmp /run/q --cleanup --bitmap-replaces ${bad}`,
    ]);
    expect(existsSync(bad)).toBe(true);
    clock = new Date(clock.getTime() + 86_400_000);
    fake.answer([cleanup, { ...made, stdout: [summary({ t0: clock.toISOString() })] }]);
    expect(await qemu()).toMatchObject({ level: "incremental", error: null });
    expect(fake.calls[0]).toContain("-b root-2026-11-28T020000Z.qcow2");
  });

  it("begin anew where the server does not know the checkpoint, without a second try", async () => {
    fake.answer([good]);
    await night();
    fake.answer([
      noBasis,
      { ...good, stdout: [summary({ t0: clock.toISOString() }), summary({ t0: clock.toISOString() })] },
    ]);
    const result = await night();
    expect(result).toMatchObject({ result: "done", level: "full", level_reason: "no checkpoint", tries: 1 });
    expect(fake.calls[1]).not.toContain("--since");
    expect(fake.calls[1]).toContain("--checkpoint");
  });

  it("are given up where nothing keeps track of the disk", async () => {
    fake.answer([noBasis, good]);
    const result = await night();
    expect(result).toMatchObject({ result: "done", level: "full", tries: 1 });
    expect(fake.calls[1]).not.toContain("--checkpoint");
    const manifest = readdirSync(at("b")).find((name) => name.endsWith(".json")) ?? "";
    expect(JSON.parse(readFileSync(join(at("b"), manifest), "utf8"))).toMatchObject({ checkpoint: null });
  });

  it("fail under level: incremental without a last backup, before the guest is touched", async () => {
    expect(await night("level: incremental")).toMatchObject({
      exit_code: 12,
      error: { problem: "no incremental backup can be made: there is no earlier backup of root" },
    });
    expect(fake.calls).toEqual([]);
  });

  it("delete the checkpoints of this job before the new one, and no others", async () => {
    const names = [
      "run.vm1.2026-11-27T020000Z",
      "run.vm1.2026-11-28T020000Z",
      "run.vm1.x",
      "run.vm12.2026-11-27T020000Z",
      "mine",
    ];
    fake.answer([good, { command: "checkpoints --control", stdout: [names.map((name) => ({ name }))] }]);
    await night();
    expect(fake.calls.filter((call) => call.startsWith("checkpoints delete"))).toEqual([
      "checkpoints delete run.vm1.2026-11-27T020000Z --control /run/c",
    ]);
  });
});

describe("a repository", () => {
  beforeEach(() => mkdirSync(at("repo")));

  it("is verified, forgotten in by the rules, and pruned where something was forgotten", async () => {
    const target = `${at("repo")}::vm1@2026-11-28T02:00:00.000000000Z`;
    const done = {
      ...summary({ target, level: "incremental", level_reason: "r" }),
      disks: [{ disk: "disk", bytes: 4, new_bytes: 2 }],
    };
    const decisions = [
      { t0: "T1", keep: false, reason: "no rule keeps it" },
      { t0: "T2", keep: true, reason: "keep-last" },
    ];
    fake.answer([
      { command: "backup", stdout: [done] },
      { command: "repo forget", stdout: [decisions] },
    ]);
    const lines = [`repository: ${at("repo")}`, "keep: {last: 1, daily: 2}", "verify: 5%", "key-file: /key"];
    const result = await run(job(...lines));
    expect(result).toMatchObject({
      level: "incremental",
      level_reason: "r",
      verified: true,
      removed: [`${at("repo")}::vm1@T1`],
    });
    expect(result.disks).toMatchObject([{ disk: "disk", bytes: 4, bytes_written: 2, target }]);
    expect(fake.calls).toEqual([
      `backup --no-progress --repo ${at("repo")} --group vm1 --level auto --key-file=/key --disk disk ${at("disk.raw")}`,
      `repo verify ${at("repo")} vm1@2026-11-28T02:00:00.000000000Z --sample 5% --key-file=/key`,
      `repo forget ${at("repo")} vm1 --keep-last 1 --keep-daily 2 --key-file=/key`,
      `repo prune ${at("repo")} --key-file=/key`,
    ]);
  });

  it("that is damaged fails the job, and nothing is removed", async () => {
    fake.answer([
      { command: "backup", stdout: [{ ...summary({ target: "r::vm1@T" }), disks: [] }] },
      { command: "repo verify", exitCode: 4 },
    ]);
    expect(await run(job(`repository: ${at("repo")}`, "keep: {last: 1}", "verify: true"))).toMatchObject({
      exit_code: 1,
      result: "failed",
    });
    expect(fake.calls.some((call) => call.startsWith("repo forget"))).toBe(false);
  });
});

describe("before it starts", () => {
  it("a folder that must be a mount point and is none fails the job", async () => {
    mkdirSync(at("b"));
    expect(await run(job(`require-mount: ${at("b")}`))).toMatchObject({
      exit_code: 1,
      error: { object: at("b"), problem: "is not mounted" },
    });
    expect(fake.calls).toEqual([]);
  });

  it("too little room for what the last backup took, or the first one is measured at, fails it", async () => {
    const huge = 2 ** 52;
    fake.answer([
      {
        command: "backup --dry-run",
        stdout: [{ target: at("b/disk-2026-11-28T020000Z.qcow2"), required: huge, target_format: "qcow2" }],
      },
    ]);
    const asked = { ...job(), checkSpace: true };
    expect(await run(asked)).toMatchObject({ exit_code: 1, error: { code: "NO_SPACE" } });
    fake.answer([{ command: "backup", stdout: [summary({ bytes_on_target: huge })], writesTargets: true }]);
    expect(await run(job())).toMatchObject({ exit_code: 0 });
    clock = new Date(clock.getTime() + 1000);
    fake.answer([]);
    expect(await run(asked)).toMatchObject({ exit_code: 1, error: { code: "NO_SPACE" } });
    expect(fake.calls).toEqual([]);
  });

  it("too little room in a repository for what its last backup brought, or none that can be read, fails it", async () => {
    mkdirSync(at("repo"));
    const asked = { ...job(`repository: ${at("repo")}`, "key-file: /key"), checkSpace: true };
    const list = {
      command: "repo list",
      stdout: [[{ disks: [{ new_bytes: 2 ** 52 }] }, { disks: [{ new_bytes: 1 }] }]],
    };
    const made = { command: "backup", stdout: [{ ...summary({ target: "r::vm1@T" }), disks: [] }] };
    fake.answer([list, made]);
    expect(await run(asked)).toMatchObject({ exit_code: 0 });
    fake.answer([{ ...list, stdout: [list.stdout[0]?.toReversed() ?? []] }]);
    expect(await run(asked)).toMatchObject({
      exit_code: 1,
      tries: 0,
      error: { code: "NO_SPACE", object: at("repo") },
    });
    fake.answer([{ command: "repo list", exitCode: 1, stdout: [failure("NOT_FOUND", "is no repository")] }]);
    expect(await run(asked)).toMatchObject({ exit_code: 1, tries: 0, error: { code: "NOT_FOUND" } });
    expect(fake.calls).toEqual([`repo list ${at("repo")} vm1 --key-file=/key`]);
  });

  it("a job outside of its window is skipped, without hooks or locks", async () => {
    const hour = (offset: number): string => String((clock.getHours() + offset) % 24).padStart(2, "0");
    const result = await run(job(`window: ${hour(2)}:00-${hour(4)}:00`, hook()));
    expect(result).toMatchObject({ result: "skipped", exit_code: 0, tries: 0 });
    expect(existsSync(at("phases"))).toBe(false);
    expect(existsSync(at("locks"))).toBe(false);
  });

  it("a source that another backup has fails it with exit code 10, before any try's hooks", async () => {
    const busy = new CowcatcherError({ code: "BUSY", object: "root", problem: "another backup is running" });
    const asked: (readonly string[])[] = [];
    const sourceCheck = (_: unknown, disks: readonly string[]): Promise<void> => {
      asked.push(disks);
      return asked.length === 4 ? Promise.resolve() : Promise.reject(busy);
    };
    const source = ["control: /run/c", "disks: [root]", "retry-wait: 1ms", hook()];
    const once = await runJob(job(...source), { ...settings(), sourceCheck });
    expect(once.result).toMatchObject({ exit_code: 10, tries: 1, error: { code: "BUSY", object: "root" } });
    expect(phases()).toEqual(["job-init", "job-abort error", "log-end error"]);
    fake.answer([{ command: "backup", stdout: [summary()], writesTargets: true }]);
    const patient = await runJob(job(...source, "retries: 5"), { ...settings(), sourceCheck });
    expect(patient.result).toMatchObject({ exit_code: 0, tries: 3 });
    expect(asked).toEqual(Array(4).fill(["root"]));
  });

  it("a repository that is not there fails it", async () => {
    expect(await run(job(`repository: ${at("none")}`))).toMatchObject({
      exit_code: 1,
      tries: 0,
      error: { code: "NOT_FOUND", object: at("none") },
    });
    expect(fake.calls).toEqual([]);
  });

  it("a disk that another run has fails it with exit code 10", async () => {
    const held = await new Locks(at("locks")).take([`the disk ${at("disk.raw")}`], 0);
    expect(await run(job("lock-wait: 1ms", hook()))).toMatchObject({
      ...{ exit_code: 10, error: { code: "LOCKED", object: `the disk ${at("disk.raw")}` } },
    });
    expect(existsSync(at("phases"))).toBe(false);
    await held.release();
  });
});

it("nothing is removed after a backup in which errors were ignored", async () => {
  const made = { command: "backup", writesTargets: true, once: true };
  const at = [28, 29, 30].map((day) => [summary({ t0: `2026-11-${day}T02:00:00.000Z` })]);
  fake.answer(at.map((stdout, index) => ({ ...made, stdout, exitCode: index === 1 ? 3 : 0 })));
  const night = async (): Promise<JobResult> => {
    const result = await run(job("keep: {last: 1}"));
    clock = new Date(clock.getTime() + 86_400_000);
    return result;
  };
  expect(await night()).toMatchObject({ exit_code: 0, removed: [] });
  expect(await night()).toMatchObject({
    ...{ exit_code: 3, removed: [] },
    warnings: ["nothing is removed after a backup with errors: the last good one may be an old one"],
  });
  expect((await night()).removed).toHaveLength(2);
});

it("several jobs: one that fails stops no other, those of one disk wait for each other", async () => {
  fake.answer([
    { command: "backup", exitCode: 13, stdout: [failure("BUFFER_FULL", "was full")], once: true },
    { command: "backup", stdout: [summary()], writesTargets: true },
  ]);
  const jobs = ["a", "b", "c"].map((name) => ({ ...job(`target: "${at(name)}/{disk}-{date}.qcow2"`), name }));
  const running: string[] = [];
  const finished = await runJobs(jobs, {
    ...settings(),
    parallel: 3,
    onFinished: ({ job: { name } }: FinishedJob) => {
      running.push(name);
      return Promise.resolve();
    },
  });
  expect(finished.map(({ job: { name } }) => name)).toEqual(["a", "b", "c"]);
  expect(finished.map(({ result }) => result.exit_code).sort((a, b) => a - b)).toEqual([0, 0, 13]);
  expect(worstExitCode(finished.map(({ result }) => result.exit_code))).toBe(13);
});

it("the worst exit code", () => {
  expect(worstExitCode([])).toBe(0);
  expect(worstExitCode([0, 3, 10])).toBe(10);
  expect(worstExitCode([2, 1, 3])).toBe(1);
  expect(worstExitCode([1, 4])).toBe(4);
  expect(worstExitCode([0, 77])).toBe(1);
});
