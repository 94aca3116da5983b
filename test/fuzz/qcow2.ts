// The fuzzer of the qcow2 driver: makes the seeds, keeps a child at work on mutants of them, and watches it. A child
// that hangs or dies is a finding about the case that it was at; the next child goes on behind that case.

import { spawn } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { QCOW2_SHAPES, makeShape } from "../support/qcow2-shapes.js";
import type { FuzzOptions, FuzzSummary } from "./main.js";
import type { CaseReport } from "./qcow2-child.js";
import { makeLibrary } from "./sandbox.js";

/** Wall-clock time: the machine may be busy. The child counts its own CPU time more strictly. */
const HANG_MS = 90_000;
const MAX_FINDINGS = 20;

export async function fuzzQcow2({ seed, seconds, firstCase }: FuzzOptions): Promise<FuzzSummary> {
  const root = mkdtempSync(join(existsSync("/dev/shm") ? "/dev/shm" : tmpdir(), "cowcatcher-fuzz-"));
  try {
    for (const shape of QCOW2_SHAPES) {
      mkdirSync(join(root, shape.name));
      makeShape(join(root, shape.name), shape);
    }
    makeLibrary(root);
    return await new Campaign(root, seed, firstCase).run(seconds);
  } finally {
    rmSync(root, { recursive: true, force: true });
  }
}

class Campaign {
  private readonly summary: FuzzSummary = { name: "qcow2", cases: 0, findings: [], notes: [] };
  private readonly refusals = new Map<string, number>();
  private next: number;
  private succeeded = 0;
  private compared = 0;

  constructor(
    private readonly root: string,
    private readonly seed: number,
    private readonly firstCase: number | undefined,
  ) {
    this.next = firstCase ?? 0;
  }

  async run(seconds: number): Promise<FuzzSummary> {
    const end = performance.now() + seconds * 1000;
    do {
      await this.runChild(Math.max(1, (end - performance.now()) / 1000));
    } while (
      this.firstCase === undefined &&
      performance.now() < end &&
      this.summary.findings.length < MAX_FINDINGS
    );
    const { summary, succeeded, compared, refusals } = this;
    summary.notes.push(
      `${succeeded} operations succeeded, ${compared} mutants compared with qemu-img convert`,
    );
    for (const [reason, count] of refusals)
      summary.notes.push(`refused but read by QEMU, ${count}: ${reason}`);
    return summary;
  }

  private runChild(seconds: number): Promise<void> {
    const script = fileURLToPath(new URL("./qcow2-child.js", import.meta.url));
    const args = [
      script,
      this.root,
      this.seed,
      this.next,
      seconds,
      ...(this.firstCase === undefined ? [] : [1]),
    ];
    const child = spawn(process.execPath, args.map(String), { stdio: ["ignore", "pipe", "inherit"] });
    let current: CaseReport | undefined;
    let hasHung = false;
    const onHang = (): void => {
      hasHung = true;
      child.kill("SIGKILL");
    };
    let watchdog = setTimeout(onHang, HANG_MS);
    createInterface({ input: child.stdout }).on("line", (line) => {
      clearTimeout(watchdog);
      watchdog = setTimeout(onHang, HANG_MS);
      const report = JSON.parse(line) as CaseReport;
      if (report.findings === undefined) current = report;
      else {
        this.finish({ ...report, notes: current?.notes ?? [], seedImage: current?.seedImage ?? "" });
        current = undefined;
      }
    });
    return new Promise((resolve, reject) => {
      child.on("error", reject);
      child.on("close", (code, signal) => {
        clearTimeout(watchdog);
        const how = hasHung ? `hangs for ${HANG_MS / 1000} s` : `kills the process (${signal ?? code ?? ""})`;
        if (current !== undefined) this.finish({ ...current, findings: [how] });
        else if (code !== 0 && this.summary.findings.length === 0) {
          this.summary.findings.push(`the fuzzer's process ends with ${signal ?? code ?? ""}`);
        }
        resolve();
      });
    });
  }

  private finish(report: CaseReport): void {
    this.next = report.case + 1;
    this.summary.cases++;
    this.succeeded += report.succeeded ?? 0;
    if (report.comparedWithQemu) this.compared++;
    for (const reason of report.refusals ?? []) {
      const kind = reason.replace(/\d+/g, "N");
      this.refusals.set(kind, (this.refusals.get(kind) ?? 0) + 1);
    }
    const { findings = [] } = report;
    if (findings.length === 0) return;
    const where = `--only qcow2 --seed ${this.seed} --case ${report.case} (${report.seedImage})`;
    const parts = [
      where,
      ...report.notes.map((note) => `  mutation: ${note}`),
      ...findings.map((text) => `  ${text}`),
    ];
    this.summary.findings.push(parts.join("\n"));
  }
}
