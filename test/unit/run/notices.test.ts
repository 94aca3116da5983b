// Pings, metrics and mail.
import { chmodSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createServer, type Server } from "node:http";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { readJobFile } from "../../../src/run/file/parse.js";
import { resolveJob } from "../../../src/run/file/resolve.js";
import type { Job } from "../../../src/run/job.js";
import { composeMails, sendMail } from "../../../src/run/notice/mail.js";
import { Notices } from "../../../src/run/notice/notices.js";
import { lastSuccessIn, metricsText, writeMetrics } from "../../../src/run/notice/prometheus.js";
import type { JobResult } from "../../../src/run/result.js";

let folder: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "cowcatcher-notices-"));
});
afterEach(() => rmSync(folder, { recursive: true, force: true }));

function job(...lines: string[]): Job {
  const own = ["image: /x", 'target: "/b/{date}"', ...lines];
  const [read] = readJobFile("f", `jobs:\n  vm1:\n${own.map((line) => `    ${line}`).join("\n")}\n`).jobs;
  const resolved = read === undefined ? undefined : resolveJob(read, []);
  if (resolved === undefined || "problem" in resolved) throw new Error(JSON.stringify(resolved));
  return resolved;
}

const result = (more: Partial<JobResult> = {}): JobResult => ({
  job: "vm1",
  group: 'g"\\\n',
  result: "done",
  exit_code: 0,
  started: "2026-11-28T02:00:00.000Z",
  ended: "2026-11-28T02:01:00.000Z",
  seconds: 60,
  level: "full",
  level_reason: "",
  tries: 1,
  verified: false,
  disks: [
    {
      disk: "root",
      target: "/b/x",
      t0: null,
      bytes: 100,
      bytes_written: 50,
      bytes_on_target: null,
      captured_bytes: 7,
      spilled_bytes: 0,
      guest_waits: 2,
      guest_wait_ms_max: 20,
      guest_wait_ms_total: 30,
      ignored_errors: 0,
    },
  ],
  removed: [],
  warnings: [],
  error: null,
  ...more,
});

describe("pings", () => {
  let server: Server;
  let asked: { url: string; body: string }[];
  let statuses: number[];
  let address: string;

  beforeEach(async () => {
    asked = [];
    statuses = [];
    server = createServer((request, response) => {
      let body = "";
      request.setEncoding("utf8").on("data", (text: string) => (body += text));
      request.on("end", () => {
        asked.push({ url: request.url ?? "", body });
        response.writeHead(statuses.shift() ?? 200).end("OK");
      });
    });
    await new Promise<void>((settle) => server.listen(0, "127.0.0.1", settle));
    address = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
  });
  afterEach(() => {
    server.closeAllConnections();
    server.close();
  });

  it("come at the start and the end, with one run's id, the result, and /fail after a failure", async () => {
    const warnings: string[] = [];
    const notices = new Notices((_, problem) => warnings.push(problem));
    const one = job(`ping: ${address}/secret?a=b`);
    for (const exit_code of [0, 1]) {
      await notices.started(one);
      await notices.finished(one, result({ exit_code }));
    }
    const urls = asked.map(({ url }) => new URL(url, address));
    expect(urls.map(({ pathname }) => pathname)).toEqual([
      "/secret/start",
      "/secret",
      "/secret/start",
      "/secret/fail",
    ]);
    const ids = urls.map(({ searchParams }) => searchParams.get("rid"));
    expect(ids[0]).toMatch(/^[0-9a-f-]{36}$/);
    expect([ids[0] === ids[1], ids[2] === ids[3], ids[0] === ids[2]]).toEqual([true, true, false]);
    expect(urls.every(({ searchParams }) => searchParams.get("a") === "b")).toBe(true);
    expect(JSON.parse(asked[3]?.body ?? "")).toMatchObject({ job: "vm1", exit_code: 1 });
    expect(warnings).toEqual([]);
  });

  it("are asked again where the monitor is out of order, and their failure names no secret", async () => {
    const warnings: string[] = [];
    const notices = new Notices((_, problem) => warnings.push(problem));
    statuses = [503];
    await notices.started(job(`ping: {start: "${address}/secret"}`));
    expect(asked).toHaveLength(2);
    statuses = [404];
    await notices.started(job(`ping: {start: "${address}/secret"}`));
    expect(asked).toHaveLength(3);
    expect(warnings).toEqual([`the ping to ${new URL(address).host} failed: answered 404`]);
  });

  it("say nothing of a job that was skipped", async () => {
    await new Notices(() => undefined).finished(job(`ping: ${address}/x`), result({ result: "skipped" }));
    expect(asked).toEqual([]);
  });
});

describe("metrics", () => {
  it("are in Prometheus' text format: every sample after its HELP and TYPE, labels escaped, a line feed at the end", () => {
    const text = metricsText(result(), undefined);
    expect(text.endsWith("\n")).toBe(true);
    let metric = "";
    for (const line of text.trimEnd().split("\n")) {
      const type = /^# (?:HELP|TYPE) (\S+) \S/.exec(line)?.[1];
      if (type !== undefined) metric = type;
      else
        expect(line).toMatch(
          new RegExp(`^${metric}\\{backup_job="vm1",group="g\\\\"\\\\\\\\\\\\n"(,disk="root")?\\} \\d`),
        );
    }
    expect(text).toContain('disk="root"} 0.03\n');
    // Unknown is not zero.
    expect(text).not.toContain("target_bytes{");
  });

  it("keep the last success through failures, are replaced as a whole, and know nothing of a skipped run", async () => {
    await writeMetrics(folder, result());
    await writeMetrics(
      folder,
      result({ started: "2026-11-29T02:00:00.000Z", result: "failed", exit_code: 1, disks: [] }),
    );
    await writeMetrics(folder, result({ started: "2026-11-30T02:00:00.000Z", result: "skipped", disks: [] }));
    expect(readdirSync(folder)).toEqual(["cowcatcher-vm1.prom"]);
    const text = readFileSync(join(folder, "cowcatcher-vm1.prom"), "utf8");
    expect(lastSuccessIn(text)).toBe(Date.parse("2026-11-28T02:00:00.000Z") / 1000);
    expect(text).toMatch(/^cowcatcher_backup_last_exit_code\{.*\} 1$/m);
    expect(text).toContain(`} ${Date.parse("2026-11-29T02:00:00.000Z") / 1000}\n`);
  });

  it("that cannot be written are told of", async () => {
    const warnings: string[] = [];
    await new Notices((_, problem) => warnings.push(problem)).finished(job("metrics: /none/x"), result());
    expect(warnings).toEqual([
      expect.stringContaining("/none/x/cowcatcher-vm1.prom: cannot write the metrics"),
    ]);
  });
});

describe("mail", () => {
  const finished = (one: Job, more: Partial<JobResult>) => ({
    job: one,
    result: result(more),
    log: ["line of the log"],
  });
  const table = (results: readonly JobResult[]): string[] => results.map(({ job: name }) => `${name}!`);
  const failed = {
    result: "failed",
    exit_code: 1,
    error: { code: "IO", object: "d", problem: "p", hint: null, message: "d: p" },
  } as const;

  it("is one a run for each address, of what concerns it", () => {
    const quiet = job("mail: a@x");
    const talkative = job("mail: [a@x, b@x]", "mail-on: always");
    expect(composeMails([finished(quiet, {}), finished(job(), failed)], table)).toEqual([]);
    const mails = composeMails([finished(quiet, failed), finished(talkative, { job: "vm2" })], table);
    expect(mails.map(({ to }) => to)).toEqual(["a@x", "b@x"]);
    expect(mails[0]?.subject).toMatch(/: 1 of 2 failed$/);
    expect(mails[0]?.body).toBe("vm1!\nvm2!\n\nvm1: d: p\nline of the log");
    expect(mails[1]?.subject).toMatch(/: all good$/);
    expect(composeMails([finished(talkative, { result: "skipped" })], table)).toEqual([]);
  });

  it("goes to sendmail, whose failure is an error", async () => {
    const program = join(folder, "sendmail");
    writeFileSync(
      program,
      `#!/bin/sh\necho "$@" > ${folder}/args\ncat > ${folder}/mail\nexit $(cat ${folder}/code)\n`,
    );
    chmodSync(program, 0o755);
    writeFileSync(join(folder, "code"), "0");
    await sendMail({ to: "a@x\nBcc: evil", subject: "s", body: ".\nb" }, program);
    expect(readFileSync(join(folder, "args"), "utf8")).toBe("-t -i\n");
    const text = readFileSync(join(folder, "mail"), "utf8");
    expect(text).toMatch(/^To: a@x Bcc: evil\nSubject: s\n[^]*\n\n\.\nb\n$/);
    writeFileSync(join(folder, "code"), "75");
    await expect(sendMail({ to: "a", subject: "", body: "" }, program)).rejects.toThrow(/exit code 75/);
    await expect(sendMail({ to: "a", subject: "", body: "" }, "/none")).rejects.toMatchObject({
      code: "NOT_FOUND",
    });
  });
});
