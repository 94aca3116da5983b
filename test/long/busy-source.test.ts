// A backup that somebody has begun by hand, of a real server's disk and of a guest that a real QEMU runs: the night's job says so before
// any of its tries begins, waits for it where it may, and leaves it alone.
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import type { RunDocument } from "../../src/cli/actions/run.js";
import { COWCATCHER_BIN, cowcatcherProcess } from "../support/cli.js";
import { noise } from "../support/disks.js";
import { Qemu } from "../support/qemu.js";
import { Process, scratchFolder, Server, stopAll, until } from "../support/server.js";

let folder: string;
let server: Server;
let qemu: Qemu;
const at = (...names: string[]): string => join(folder, ...names);

beforeAll(async () => {
  folder = scratchFolder();
  for (const name of ["qemu", "fleece"]) mkdirSync(at(name));
  writeFileSync(at("root.raw"), noise(8 * 2 ** 20));
  server = await Server.start(folder, [`${at("root.raw")}=root`], { args: ["-f", "raw"] });
  qemu = await Qemu.start(at("qemu"), { format: "qcow2", running: true });
  await qemu.fill();
});
afterAll(stopAll);

async function run(source: string, more: string): Promise<RunDocument["jobs"][number]> {
  const target = `target: "${at("backup")}/{group}-{date}.qcow2"`;
  writeFileSync(at("jobs.yaml"), `jobs: {night: {${source}, ${target}, ${more}}}\n`, { mode: 0o600 });
  const { stdout } = await cowcatcherProcess(["run", "night", "--json", "--config", at("jobs.yaml")]);
  const [job] = (JSON.parse(stdout) as RunDocument).jobs;
  if (job === undefined) throw new Error(stdout);
  return job;
}

/** Of a backup that takes long; fulfilled after its T0. */
async function byHand(...args: string[]): Promise<Process> {
  const backup = new Process(process.execPath, [
    COWCATCHER_BIN,
    "backup",
    "--json",
    "--rate-limit",
    "256K",
    ...args,
  ]);
  await until(
    "T0 of the backup by hand",
    () => backup.lines.some((line) => line.includes('"started"')),
    60_000,
  );
  return backup;
}

describe.each([
  [
    "a server",
    () => `control: ${server.control}`,
    () => ["--control", server.control, at("hand-server.qcow2")],
  ],
  [
    "a QEMU",
    () => `qmp: ${qemu.monitor}, disks: [vd0], options: {fleece-dir: ${at("fleece")}}`,
    () => ["--qmp", qemu.monitor, "--disk", "vd0", "--fleece-dir", at("fleece"), at("hand-qemu.qcow2")],
  ],
])("another backup of %s", (_, source, handArgs) => {
  it("fails the job with exit code 10 before its first try, or is waited for", async () => {
    const hand = await byHand(...handArgs());
    expect(await run(source(), "level: full")).toMatchObject({
      ...{ exit_code: 10, level: null, disks: [], error: { code: "BUSY" } },
    });
    const waiting = run(source(), "level: full, lock-wait: 10m");
    expect(hand.over).toBe(false);
    hand.kill("SIGINT");
    expect((await hand.end()).code).toBe(130);
    expect(await waiting).toMatchObject({ result: "done", exit_code: 0, tries: 1 });
  });
});
