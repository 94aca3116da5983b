// Nights of a real server's guest and of a machine that is off, by job files, to files and into a repository.
import { appendFileSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, expect, it } from "vitest";
import type { RunDocument } from "../../../src/cli/actions/run.js";
import { cowcatcher, run } from "../../support/cli.js";
import { guestWith, ScriptedAgent } from "../../support/guest-agent.js";
import { expectSchema } from "../../support/json-schema.js";
import { scratchFolder, Server, stopAll } from "../../support/server.js";

let folder: string;
let server: Server;
let agent: ScriptedAgent;
const at = (name: string): string => join(folder, name);
const noise = (): Buffer => Buffer.from(Array.from({ length: 4 << 20 }, (_, index) => (index * 7919) >> 8));

beforeAll(async () => {
  folder = scratchFolder();
  mkdirSync(at("jobs.d"));
  for (const disk of ["root.raw", "data.raw", "off.raw"]) writeFileSync(at(disk), noise());
  server = await Server.start(folder, [`${at("root.raw")}=root`, `${at("data.raw")}=data`]);
  expect((await cowcatcher(["repo", "init", at("repo")])).code).toBe(0);
  const guest = guestWith(2);
  agent = await new ScriptedAgent((command) => {
    if (/freeze$|thaw$/.test(command)) appendFileSync(at("phases"), `${command} live\n`);
    return guest(command);
  }).listen();
  writeFileSync(
    at("jobs.d/vm.yaml"),
    `defaults:
  target: ${at("backup")}/{group}/{disk}-{date}.qcow2
  keep: {last: 2}
  verify: true
  metrics: ${folder}
jobs:
  live:
    control: ${server.control}
    freeze: ${agent.path}
    hook: [/bin/sh, -c, 'echo "$0 $1" >> ${at("phases")}']
  off:
    image: ${at("off.raw")}
    repository: ${at("repo")}
  broken:
    image: ${at("none.raw")}
    hook: [/bin/sh, -c, 'echo "$0 $1" >> ${at("phases")}']
`,
  );
});
afterAll(async () => {
  agent.close();
  await stopAll();
});

async function night(...args: string[]): Promise<RunDocument> {
  const { code, stdout } = await cowcatcher(["run", "--json", "--config", at("jobs.d"), ...args]);
  const document = JSON.parse(stdout) as RunDocument;
  expectSchema("run", document);
  expect(document.exit_code).toBe(code);
  return document;
}

const files = (): string[] => readdirSync(at("backup/live")).filter((name) => name.endsWith(".qcow2"));

it("makes chains of all disks at one T0 and backups in a repository, whatever fails beside them", async () => {
  const first = await night("--all", "--parallel", "2");
  expect(first.jobs.map(({ job, result, exit_code, level }) => [job, result, exit_code, level])).toEqual([
    ["broken", "failed", 1, "full"],
    ["live", "done", 0, "full"],
    ["off", "done", 0, "full"],
  ]);
  expect(first.exit_code).toBe(1);
  const phases = readFileSync(at("phases"), "utf8").trim().split("\n");
  expect(phases.filter((line) => line.endsWith(" broken")).slice(-2)).toEqual([
    "job-abort broken",
    "log-end broken",
  ]);
  expect(phases.filter((line) => line.endsWith(" live")).map((line) => line.replace(" live", ""))).toEqual([
    ...["job-init", "job-start", "backup-start", "guest-fsfreeze-freeze", "t0", "guest-fsfreeze-thaw"],
    ...["thaw", "backup-end", "job-end", "log-end"],
  ]);
  // Between the nights the guest writes, on both disks.
  for (const [disk, offset] of [
    ["root", "1M"],
    ["data", "2M"],
  ] as const) {
    await run("qemu-io", ["-f", "raw", "-c", `write -P 7 ${offset} 64k`, server.uri(disk)]);
  }
  const second = await night("live", "off");
  expect(second.jobs.map(({ job, result }) => [job, result])).toEqual([
    ["live", "done"],
    ["off", "done"],
  ]);
  const [live] = second.jobs;
  expect(live?.disks.map(({ disk, bytes_written }) => [disk, bytes_written])).toEqual([
    ["root", 65_536],
    ["data", 65_536],
  ]);
  expect(new Set(live?.disks.map(({ t0 }) => t0)).size).toBe(1);
  for (const { disk, target } of live?.disks ?? []) {
    expect((await run("qemu-img", ["compare", "-U", at(`${disk}.raw`), target])).code).toBe(0);
  }
  expect(live).toMatchObject({ level: "incremental", verified: false });
  expect(files()).toHaveLength(4);
  const checkpoints = JSON.parse(
    (await cowcatcher(["checkpoints", "--control", server.control, "--json"])).stdout,
  ) as unknown[];
  expect(checkpoints).toHaveLength(2);
  expect(readFileSync(at("cowcatcher-live.prom"), "utf8")).toContain(
    'incremental{backup_job="live",group="live"} 1',
  );
});
