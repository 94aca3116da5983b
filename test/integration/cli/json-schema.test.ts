// docs/schema holds for what every command that takes --json prints, each run for real, in success and in failure.
import * as fs from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { COMMAND_NAMES } from "../../../src/cli/output/exit-codes.js";
import { cowcatcher, run } from "../../support/cli.js";
import { expectSchema } from "../../support/json-schema.js";
import { scratchFolder, Server, stopAll } from "../../support/server.js";

let folder: string;
let server: Server;
const at = (name: string): string => join(folder, name);

beforeAll(async () => {
  folder = scratchFolder();
  fs.writeFileSync(at("disk.raw"), Buffer.alloc(4 << 20, 7));
  fs.writeFileSync(at("served.raw"), Buffer.alloc(4 << 20, 7));
  await run("qemu-img", ["create", "-q", "-f", "qcow2", "-b", "disk.raw", "-F", "raw", at("top.qcow2")]);
  await run("qemu-io", ["-c", "write 0 128k", at("top.qcow2")]);
  await run("qemu-img", ["snapshot", "-c", "s1", at("top.qcow2")]);
  await run("qemu-img", ["bitmap", "--add", at("top.qcow2"), "b0"]);
  await run("qemu-img", ["create", "-q", "-f", "qcow2", at("leak.qcow2"), "4M"]);
  const fd = fs.openSync(at("leak.qcow2"), "r+");
  fs.ftruncateSync(fd, 1 << 20);
  // A reference count for a cluster that nothing refers to.
  fs.writeSync(fd, Buffer.from([0, 1]), 0, 2, 2 * 65536 + 2 * 8);
  fs.closeSync(fd);
  expect((await cowcatcher(["repo", "init", at("repo")])).code).toBe(0);
  expect((await cowcatcher(["backup", at("disk.raw"), "--repo", at("repo"), "--group", "first"])).code).toBe(
    0,
  );
  const job = (source: string): string => `{image: ${at(source)}, target: "${at("{disk}-{date}.qcow2")}"}`;
  fs.writeFileSync(at("jobs.yaml"), `jobs:\n  good: ${job("disk.raw")}\n  bad: ${job("none.raw")}\n`);
  fs.writeFileSync(at("wrong.yaml"), "jobs: {a: {imag: x}}\n");
  server = await Server.start(folder, [at("served.raw")], { args: ["--json"] });
});

afterAll(stopAll);

const check = expectSchema;

const linesOf = (stdout: string): unknown[] =>
  stdout
    .trimEnd()
    .split("\n")
    .map((line) => JSON.parse(line) as unknown);

/** By command: arguments of runs that succeed, the schema of what they print, and whether that is a document or lines. */
const RUNS: Record<string, { args: () => string[]; schema: string; lines?: true; codes?: number[] }[]> = {
  backup: [
    {
      args: () => [at("disk.raw"), at("b1.qcow2"), "-c", "--rate-limit", "3M"],
      schema: "backup",
      lines: true,
    },
    { args: () => [at("disk.raw"), "null:"], schema: "backup", lines: true },
    { args: () => ["--control", server.control, "--verify", at("b2.raw")], schema: "backup", lines: true },
    {
      args: () => ["--control", server.control, "--checkpoint", "c1", at("c1.raw")],
      schema: "backup",
      lines: true,
    },
    {
      args: () => ["--control", server.control, "--since", "c1", "--force", "-O", "raw", at("c1.raw")],
      schema: "backup",
      lines: true,
    },
    {
      args: () => ["--control", server.control, "--since", "c0", "--since-or-full", at("c0.raw")],
      schema: "backup",
      lines: true,
    },
    {
      args: () => [at("disk.raw"), "--repo", at("repo"), "--group", "vm1"],
      schema: "backup",
      lines: true,
    },
    { args: () => ["--dry-run", at("disk.raw"), at("b3.qcow2")], schema: "dry-run" },
    { args: () => ["--dry-run", "--control", server.control, at("b3.raw")], schema: "dry-run" },
  ],
  restore: [{ args: () => [at("top.qcow2"), at("r.raw")], schema: "backup", lines: true }],
  jobs: [{ args: () => ["--control", server.control], schema: "jobs" }],
  checkpoints: [{ args: () => ["--control", server.control], schema: "checkpoints" }],
  info: [
    { args: () => [at("disk.raw")], schema: "info" },
    { args: () => [at("top.qcow2")], schema: "info" },
    { args: () => ["--backing-chain", at("top.qcow2")], schema: "info" },
    { args: () => [server.uri()], schema: "info" },
    { args: () => [`${at("repo")}::first`], schema: "info" },
  ],
  map: [{ args: () => [at("top.qcow2")], schema: "map" }],
  check: [
    { args: () => [at("top.qcow2")], schema: "check" },
    { args: () => [at("leak.qcow2")], schema: "check", codes: [0, 2, 3] },
  ],
  compare: [
    { args: () => [at("disk.raw"), at("disk.raw")], schema: "compare" },
    { args: () => [at("disk.raw"), at("top.qcow2")], schema: "compare", codes: [1] },
  ],
  create: [
    { args: () => [at("new.raw"), "1M"], schema: "create" },
    { args: () => ["-f", "qcow2", "-b", at("disk.raw"), "-F", "raw", at("new.qcow2")], schema: "create" },
  ],
  bench: [
    {
      args: () => ["--dir", folder, "--size", "1M", "--runtime", "100ms", "--rate-limit", "0"],
      schema: "bench",
    },
  ],
  repo: [
    { args: () => ["init", at("repo2"), "--chunk-size", "1M"], schema: "repo-init" },
    { args: () => ["protect", `${at("repo")}::vm1`], schema: "repo-protect" },
    { args: () => ["list", at("repo")], schema: "repo-list" },
    { args: () => ["stats", at("repo")], schema: "repo-stats" },
    { args: () => ["verify", at("repo")], schema: "repo-verify" },
    { args: () => ["unprotect", `${at("repo")}::vm1`], schema: "repo-protect" },
    { args: () => ["forget", at("repo"), "vm1", "--keep-last", "1", "--dry-run"], schema: "repo-forget" },
    { args: () => ["forget", `${at("repo")}::vm1@latest`], schema: "repo-forget" },
    { args: () => ["prune", at("repo")], schema: "repo-prune" },
    { args: () => ["key", "list", at("repo")], schema: "repo-key" },
  ],
  run: [
    { args: () => ["--all", "--config", at("jobs.yaml")], schema: "run", codes: [1] },
    { args: () => ["--check", "--config", at("wrong.yaml")], schema: "run-check", codes: [2] },
    { args: () => ["--dry-run", "--all", "--config", at("jobs.yaml")], schema: "run-dry-run" },
  ],
  // Ends with the test: its line is looked at below.
  serve: [],
  // Needs nbdfuse: test/long/repository-files.test.ts.
  mount: [],
  // Need guestfish: guest-files.test.ts.
  ls: [],
  cat: [],
  cp: [],
};

const FAILURES: Record<string, string[]> = {
  backup: ["none.raw", "b.raw"],
  restore: ["none.raw", "b.raw"],
  serve: ["none.raw", "--socket", "s"],
  jobs: ["--control", "none"],
  checkpoints: ["delete", "none", "--control", "none"],
  info: ["none.raw"],
  map: ["none.raw"],
  check: ["none.qcow2"],
  compare: ["none.raw", "none.raw"],
  repo: ["list", "none"],
  run: ["--all", "--config", "none"],
  create: ["/dev/none.raw", "1M"],
  bench: ["--dir", "/none"],
  mount: ["none::vm", "none"],
  ls: ["none.raw"],
  cat: ["none.raw", "/a"],
  cp: ["none.raw", "/a", "."],
};

describe.each(COMMAND_NAMES)("%s --json", (command) => {
  it("prints what its schema says", async () => {
    const runs = RUNS[command];
    expect(runs, "a command without a schema: see docs/json.md").toBeDefined();
    for (const { args, schema, lines, codes = [0] } of runs ?? []) {
      const { code, stdout, stderr } = await cowcatcher([command, ...args(), "--json"]);
      expect(codes, stderr).toContain(code);
      if (lines === undefined) check(schema, JSON.parse(stdout));
      else for (const line of linesOf(stdout)) check(schema, line);
    }
  });

  it("prints an error as the schema says", async () => {
    const { code, stdout } = await cowcatcher([command, ...(FAILURES[command] ?? []), "--json"], {
      cwd: folder,
    });
    expect(code).toBeGreaterThan(0);
    const last = linesOf(stdout).at(-1);
    check("error", last);
    if (command === "backup" || command === "restore") check("backup", last);
  });
});

it("serve --json prints what its schema says", () => {
  check("serve", JSON.parse(server.process.lines[0] ?? ""));
});

it("a schema refuses what it does not describe", () => {
  expect(() => check("error", { message_type: "error" })).toThrow();
  expect(() => check("jobs", [{ job: "x" }])).toThrow();
});
