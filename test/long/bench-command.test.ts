// `bench` as a user runs it, on tiny disks: the shapes of its results, and that it leaves nothing behind.
import { spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { COWCATCHER_BIN, cowcatcher, run, type RunResult } from "../support/cli.js";
import { Process, scratchFolder, stopAll, until } from "../support/server.js";

const TINY = ["--size", "8M", "--runtime", "200ms", "--rate-limit", "40M"];
/** A backup of that size takes six seconds: its guest gets at it, and a signal finds it at work. */
const SLOW = ["--rate-limit", "1M"];

let folder: string;
/** Where sockets go, so that what is left of them is seen, too. */
let temporary: string;

beforeEach(() => {
  folder = scratchFolder();
  temporary = join(folder, "tmp");
  mkdirSync(temporary);
});
afterEach(stopAll);

function bench(args: readonly string[], env: Record<string, string> = {}): Promise<RunResult> {
  return cowcatcher(["bench", "--dir", folder, ...args], { env: { TMPDIR: temporary, ...env } });
}

function expectNothingLeft(kept: readonly string[] = []): void {
  expect(readdirSync(folder).sort()).toEqual(["tmp", ...kept].sort());
  expect(readdirSync(temporary)).toEqual([]);
}

interface Phase {
  phase: string;
  writes: number;
  seconds: number;
  iops: number;
  iops_ratio: number;
  latency_ms: { average: number; p99: number; longest: number };
  backup: null | {
    cow_buffer_size: number;
    complete: boolean;
    ended_before_guest: boolean;
    seconds: number;
    bytes_done: number;
    disk_rate: number;
    captured_bytes: number;
  };
}

function phasesOf({ stdout }: RunResult): Phase[] {
  return (JSON.parse(stdout) as { phases: Phase[] }).phases;
}

describe("bench", () => {
  it("prints a table of the three phases and leaves nothing, at a target of the user's neither", async () => {
    const target = join(folder, "there.qcow2");
    const result = await bench([...TINY, "--target", target]);
    expect(result).toMatchObject({ code: 0, stderr: "" });
    const lines = result.stdout.trimEnd().split("\n");
    expect(lines[0]).toContain(`backup to ${target} at 40.0 MiB/s`);
    expect(lines.slice(2, 6).map((line) => line.split(/ {2,}/)[0])).toEqual([
      "BACKUP",
      "no backup",
      "unbuffered",
      "buffered, 256 MiB",
    ]);
    expect(result.stdout).toMatch(
      /^Of its writes the guest kept \d+ % with the buffered backup, \d+ % with the unbuffered one\.$/m,
    );
    expectNothingLeft();
  });

  it("draws the guest's writes before, during and after, as SVG and in a terminal", async () => {
    const plot = join(folder, "guest.svg");
    const command = [process.execPath, COWCATCHER_BIN, "bench", "--dir", folder, "--plot", plot, ...TINY];
    // A terminal of its own, by util-linux.
    const env = { TMPDIR: temporary, TERM: "xterm" };
    const shown = await run("script", ["-qec", command.join(" "), "/dev/null"], { env });
    expect(shown.code).toBe(0);
    expect(shown.stdout.match(/└T0/g)).toHaveLength(2);
    expect(shown.stdout).toContain("\u001b[36m");
    const svg = readFileSync(plot, "utf8");
    expect(svg.match(/<path d="M[\d. L]+" fill="none"/g)).toHaveLength(3);
    // T0 and the end of two backups.
    expect(svg.match(/stroke-dasharray/g)).toHaveLength(4);
    const plain = await run("script", ["-qec", command.join(" "), "/dev/null"], {
      env: { ...env, NO_COLOR: "1" },
    });
    expect(plain.stdout).toContain("└T0");
    expect(plain.stdout).not.toContain("\u001b[3");
    expectNothingLeft(["guest.svg"]);
  });

  it("gives its figures as one JSON document", async () => {
    const format = "qcow2";
    const result = await bench([
      ...TINY,
      ...SLOW,
      "--json",
      "-f",
      format,
      "--cow-buffer-size",
      "4M",
      "--iodepth",
      "4",
    ]);
    expect(result).toMatchObject({ code: 0, stderr: "" });
    expect(JSON.parse(result.stdout)).toMatchObject({
      size: 8 * 2 ** 20,
      format,
      target: null,
      rate_limit: 2 ** 20,
      block_size: 32_768,
      iodepth: 4,
      runtime: 0.2,
    });
    const phases = phasesOf(result);
    expect(phases.map(({ phase }) => phase)).toEqual(["no backup", "unbuffered", "buffered"]);
    for (const { writes, seconds, iops, latency_ms } of phases) {
      expect(writes).toBeGreaterThan(0);
      expect(seconds).toBeGreaterThanOrEqual(0.2);
      expect(iops).toBeCloseTo(writes / seconds, -2);
      expect(latency_ms.average).toBeGreaterThan(0);
      expect(latency_ms.longest).toBeGreaterThanOrEqual(latency_ms.p99);
    }
    const backups = phases.map(({ backup }) => backup);
    expect(backups[0]).toBeNull();
    expect(backups[1]).toMatchObject({ cow_buffer_size: 0, complete: true, bytes_done: 8 * 2 ** 20 });
    expect(backups[2]).toMatchObject({ cow_buffer_size: 4 * 2 ** 20, complete: true });
    expect(backups[2]?.captured_bytes).toBeGreaterThan(0);
    expectNothingLeft();
  });

  it("cancels a backup that takes longer than --backup-timeout, and says how far it came", async () => {
    const result = await bench([...TINY, "--rate-limit", "512K", "--backup-timeout", "0", "--json"]);
    expect(result.code).toBe(0);
    for (const { backup } of phasesOf(result).slice(1)) {
      expect(backup?.complete).toBe(false);
      expect(backup?.bytes_done).toBeLessThan(8 * 2 ** 20);
    }
    expectNothingLeft();
  });

  it("says when a backup ended before its guest", async () => {
    const quick = ["--size", "1M", "--rate-limit", "0", "--runtime", "3s", "--target", "null:"];
    const result = await bench([...TINY, ...quick]);
    expect(result).toMatchObject({ code: 0, stderr: "" });
    expect(result.stdout).toMatch(/backup ended before the guest did/);
  });
});

describe("bench refuses", () => {
  it("a plot where none can be written, before it makes anything", async () => {
    const plot = join(folder, "missing", "guest.svg");
    expect(await bench([...TINY, "--plot", plot])).toMatchObject({
      code: 1,
      stderr: `cowcatcher: ${plot}: cannot write the plot: no such file or directory\n`,
    });
    expect((await bench([...TINY, "--plot", folder])).stderr).toMatch(/is there, and no file/);
    expectNothingLeft();
  });

  it("a target that is there, and does not touch it", async () => {
    const target = join(folder, "precious.raw");
    writeFileSync(target, "precious");
    const result = await bench([...TINY, "--target", target]);
    expect(result).toMatchObject({
      code: 1,
      stderr: `cowcatcher: ${target}: exists already (choose a name that is free)\n`,
    });
    const forced = await bench([...TINY, "--target", target, "--force"]);
    expect(forced.code).toBe(1);
    expect(readFileSync(target, "utf8")).toBe("precious");
    expectNothingLeft(["precious.raw"]);
  });

  it("a disk for which there is no space, before it writes anything", async () => {
    const result = await bench(["--size", "900T"]);
    expect(result.code).toBe(1);
    expect(result.stderr).toMatch(/^cowcatcher: .*: .* are free, and 1\.76 PiB are needed \(choose .*\)\n$/);
    expectNothingLeft();
  });

  it("a folder that is not there", async () => {
    const missing = join(folder, "missing");
    const result = await bench([...TINY, "--dir", missing]);
    expect(result.code).toBe(1);
    expect(result.stderr).toBe(
      `cowcatcher: ${missing}: cannot look for free space: no such file or directory\n`,
    );
  });
});

describe("bench, when things go wrong", () => {
  it("shows a backup's failure in one line and leaves nothing", async () => {
    const result = await bench(TINY, { COWCATCHER_FAULTS: "target-write:error=ENOSPC" });
    expect(result.code).toBe(1);
    expect(result.stderr).toMatch(/^cowcatcher: .*target\.raw.*no space left on the device.*\n$/);
    expectNothingLeft();
  });

  it("shows the server's failure in one line and leaves nothing", async () => {
    const result = await bench(TINY, { TMPDIR: join(folder, "missing") });
    expect(result.code).toBe(1);
    expect(result.stderr).toMatch(
      /^cowcatcher: .*missing: cannot make a folder: no such file or directory\n$/,
    );
    expectNothingLeft();
  });

  it.each([
    ["making", "SIGINT", 130],
    ["unbuffered", "SIGINT", 130],
    ["buffered", "SIGTERM", 143],
  ] as const)("interrupted at '%s' by %s, it ends with %d and leaves nothing", async (step, signal, code) => {
    const target = join(folder, "target.raw");
    const size = step === "making" ? "256M" : "8M";
    const process_ = startBench([...TINY, ...SLOW, "--size", size, "-p", "--target", target]);
    await until(`step ${step}`, () => process_.stderr.split("\n").some((line) => line.startsWith(step)));
    process_.kill(signal);
    const { code: ended, stderr } = await process_.end();
    expect(ended).toBe(code);
    const last = stderr.trimEnd().split("\n").at(-1);
    expect(last).toBe(
      `cowcatcher: bench: interrupted by ${signal} (the test disk and the backups were removed)`,
    );
    expectNothingLeft();
  });

  it("ends the same way where the terminal's signal reaches its server, too", async () => {
    const args = ["bench", "--dir", folder, "--size", "8M", "--runtime", "60s", "--rate-limit", "1M", "-p"];
    const child = spawn(process.execPath, [COWCATCHER_BIN, ...args], {
      detached: true,
      env: { ...process.env, TMPDIR: temporary },
    });
    let stderr = "";
    child.stderr.setEncoding("utf8").on("data", (text: string) => (stderr += text));
    const ended = once(child, "close");
    await until("the guest at work", () => stderr.includes("no backup") && socketIsThere());
    process.kill(-(child.pid ?? 0), "SIGINT");
    expect(await ended).toEqual([130, null]);
    expect(stderr).toMatch(/interrupted by SIGINT \(the test disk and the backups were removed\)\n$/);
    expectNothingLeft();
  });
});

function startBench(args: readonly string[]): Process {
  const env = { TMPDIR: temporary };
  return new Process(process.execPath, [COWCATCHER_BIN, "bench", "--dir", folder, ...args], env);
}

function socketIsThere(): boolean {
  const [sockets] = readdirSync(temporary);
  return sockets !== undefined && existsSync(join(temporary, sockets, "nbd"));
}
