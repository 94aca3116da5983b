// `jobs` against the control socket, with jobs that do what the test says.
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { pino } from "pino";
import { afterEach, beforeEach, expect, it } from "vitest";
import { runProgram } from "../../../src/cli/program.js";
import { ControlClient } from "../../../src/qmp/client.js";
import { startBackup } from "../../../src/control/jobs-from-qmp.js";
import { ControlServer } from "../../../src/control/server.js";
import { MiB } from "../../../src/units.js";
import { FakeJobHost } from "../../support/fake-job-host.js";

let folder: string;
let socket: string;
let host: FakeJobHost;
let server: ControlServer;

beforeEach(async () => {
  folder = mkdtempSync(join(tmpdir(), "cowcatcher-jobs-"));
  socket = join(folder, "control");
  host = new FakeJobHost();
  server = new ControlServer({ host, logger: pino({ level: "silent" }) });
  await server.listen(socket);
  const client = await ControlClient.connect(socket);
  await startBackup(client, [{ id: "j1", disk: "disk", options: { target: "/b/disk.raw" } }]);
  client.close();
});

afterEach(async () => {
  await server.close();
  rmSync(folder, { recursive: true });
});

async function jobs(...args: string[]): Promise<{ code: number; stdout: string; stderr: string }> {
  let stdout = "";
  let stderr = "";
  const code = await runProgram(["jobs", "--control", socket, ...args], {
    stdout: { write: (text) => (stdout += text) },
    stderr: { write: (text) => (stderr += text) },
    environment: {},
  });
  return { code, stdout, stderr };
}

it("lists jobs as a table, or as a document", async () => {
  host.job("j1").counters.bytesDone = 1024;
  const table = await jobs();
  expect([table.code, table.stderr]).toEqual([0, ""]);
  expect(table.stdout).toMatch(/^ID +DISK +STATUS +DONE .*\nj1 +disk +running +25% .* \/b\/disk\.raw\n$/);
  const document = await jobs("--json");
  expect(JSON.parse(document.stdout)).toMatchObject([
    {
      job: "j1",
      disk: "disk",
      target: "/b/disk.raw",
      status: "running",
      bytes_done: 1024,
      percent_done: 0.25,
    },
  ]);
});

it("pauses, resumes, slows down and cancels a job", async () => {
  expect(await jobs("pause", "j1")).toEqual({ code: 0, stdout: "", stderr: "" });
  expect(host.job("j1").status).toBe("paused");
  expect((await jobs("resume", "j1")).code).toBe(0);
  expect(host.job("j1").status).toBe("running");
  expect((await jobs("set-speed", "j1", "50M")).code).toBe(0);
  expect(host.job("j1").speed).toBe(50 * MiB);
  expect((await jobs("set-speed", "j1", "0")).code).toBe(0);
  expect(host.job("j1").speed).toBe(0);
  const job = host.job("j1");
  const { code, stdout } = await jobs("cancel", "j1", "--json");
  expect(code).toBe(0);
  expect(job.error?.code).toBe("CANCELLED");
  expect(Array.isArray(JSON.parse(stdout))).toBe(true);
});

it.each([["cancel"], ["pause"], ["set-speed", "1M"]])(
  "names the job that %s does not find",
  async (action, ...rest) => {
    const { code, stdout, stderr } = await jobs(action, "j2", ...rest);
    expect([code, stdout]).toEqual([1, ""]);
    expect(stderr).toMatch(/^cowcatcher: job j2: .*not found \(cowcatcher jobs lists the jobs\)\n$/);
  },
);

it("says so where no server is", async () => {
  await server.close();
  const { code, stderr } = await jobs();
  expect(code).toBe(1);
  expect(stderr).toBe(
    `cowcatcher: ${socket}: cannot connect: no such file or directory (is \`cowcatcher serve --control\` running there?)\n`,
  );
});
