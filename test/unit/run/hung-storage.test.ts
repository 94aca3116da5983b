// Storage that does not answer, and processes that do not end: a run goes on without them. Real storage that hangs is in
// test/long/hung-target.test.ts; here a shell that waits stands for whoever is held in the kernel.
import { existsSync, mkdtempSync, readFileSync, rmSync, statSync, utimesSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, expect, it } from "vitest";
import { runChild } from "../../../src/run/child.js";
import { reachFolder } from "../../../src/run/reach.js";
import { until } from "../../support/server.js";

let folder: string;
const at = (...names: string[]): string => join(folder, ...names);
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "cowcatcher-hung-"));
});
afterEach(() => rmSync(folder, { recursive: true, force: true }));

it("a folder whose storage answers is made, for this user alone, and written to", async () => {
  await reachFolder(at("a", "b"), { makes: true });
  expect([statSync(at("a")).mode & 0o777, statSync(at("a", "b")).mode & 0o777]).toEqual([0o700, 0o700]);
  utimesSync(at("a", "b"), 1, 1);
  await reachFolder(at("a", "b"), { makes: true });
  expect(statSync(at("a", "b")).mtimeMs).toBeGreaterThan(1000);
});

it("a folder that is only looked at is not made, and what is wrong with it is left to others to say", async () => {
  await reachFolder(at("none", "such"), { makes: false });
  expect(existsSync(at("none"))).toBe(false);
  writeFileSync(at("file"), "");
  await reachFolder(at("file", "below"), { makes: true });
});

it("a folder whose storage does not answer is an error, and whoever asked is ended", async () => {
  const script = `echo $$ > "${at("pid")}"; while :; do sleep 1; done`;
  await expect(reachFolder(folder, { makes: true, timeoutMs: 500, script })).rejects.toMatchObject({
    ...{ code: "IO", errno: "ETIMEDOUT", object: folder },
    problem: "its storage has not answered within 0.5 s",
  });
  const pid = Number(readPid());
  await until("the end of whoever asked", () => !existsSync(`/proc/${pid}`), 60_000);
});

it("a process that does not end, though it was killed, is left behind", async () => {
  // What it has started holds its output open, as a process in the kernel's hands would.
  writeFileSync(
    at("held.cjs"),
    `const { pid } = require("node:child_process").spawn("sleep", ["60"], { detached: true, stdio: "inherit" });
     require("node:fs").writeFileSync(${JSON.stringify(at("pid"))}, String(pid));
     process.on("SIGTERM", () => undefined);
     console.log('{"message_type":"started"}');`,
  );
  let holder = 0;
  const stop = new AbortController();
  const result = await runChild([process.execPath, at("held.cjs")], {
    args: ["backup"],
    graceMs: 50,
    signal: stop.signal,
    onMessage: () => {
      holder = Number(readPid());
      stop.abort();
    },
  });
  process.kill(holder, "SIGKILL");
  expect(result).toMatchObject({
    exitCode: 1,
    error: { code: "IO", problem: "does not end, though it was killed" },
  });
});

function readPid(): string {
  return readFileSync(at("pid"), "utf8");
}
