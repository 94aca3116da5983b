// The gate between freeze and T0: T0 comes when it opens, else the guest is thawed and there is none.
import { createServer, type Server, type Socket } from "node:net";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, expect, it } from "vitest";
import { whileFrozen } from "../../../src/backup/job/while-frozen.js";
import type { CowcatcherError } from "../../../src/errors.js";
import { GuestFreeze } from "../../../src/qemu/guest-freeze.js";
import { GatedFreeze } from "../../../src/qemu/t0-gate.js";
import { guestWith, ScriptedAgent } from "../../support/guest-agent.js";

const FREEZE = "guest-fsfreeze-freeze";
const THAW = "guest-fsfreeze-thaw";
let folder: string;
let agent: ScriptedAgent;
let gate: Server;
let keep: (socket: Socket) => void;
const path = (): string => join(folder, "gate");

beforeEach(async () => {
  folder = mkdtempSync(join(tmpdir(), "cowcatcher-gate-"));
  agent = await new ScriptedAgent(guestWith(2)).listen();
  gate = createServer((socket) => {
    socket.on("error", () => undefined);
    keep(socket);
  });
  await new Promise<void>((settle) => gate.listen(path(), settle));
});
afterEach(() => {
  agent.close();
  gate.close();
  rmSync(folder, { recursive: true, force: true });
});

const steps: string[] = [];
async function take(signal?: AbortSignal, limitMs?: number): Promise<unknown> {
  steps.length = 0;
  const freezer = new GatedFreeze(new GuestFreeze(agent.path), path(), limitMs);
  const step = (): Promise<void> => {
    steps.push(...agent.done, "T0");
    return Promise.resolve();
  };
  return whileFrozen(freezer, step, signal).then(
    () => freezer.info,
    (error: unknown) => (error as CowcatcherError).problem,
  );
}

it("opens while the guest is frozen, before T0", async () => {
  const frozen: string[][] = [];
  keep = (socket) => {
    frozen.push([...agent.done]);
    socket.write("g");
    socket.write("o\n");
  };
  expect(await take()).toMatchObject({ fileSystemCount: 2, isHeld: true });
  expect(frozen.map((done) => done.at(-1))).toEqual([FREEZE]);
  expect(steps.slice(-2)).toEqual([FREEZE, "T0"]);
  expect(agent.done.at(-1)).toBe(THAW);
});

it.each<[string, (socket: Socket) => void, string]>([
  [
    "says no",
    (socket) => socket.end("the database did not flush\n"),
    "the gate of T0 says: the database did not flush",
  ],
  ["hangs up", (socket) => socket.end(), "the gate of T0 hung up without an answer"],
  ["says half of it", (socket) => socket.end("go"), "the gate of T0 hung up without an answer"],
  ["says nothing", () => undefined, "the gate of T0 gave no answer within 0.05 s"],
  [
    "never comes to an end",
    (socket) => socket.write("x".repeat(5000)),
    `the gate of T0 says: ${"x".repeat(4096)}`,
  ],
])("that %s keeps T0 from coming, and the guest is thawed", async (_, how, problem) => {
  keep = how;
  expect(await take(undefined, 50)).toBe(problem);
  expect(steps).toEqual([]);
  expect(agent.done.slice(-2)).toEqual([FREEZE, THAW]);
});

it("that is not there keeps T0 from coming, and the guest is thawed", async () => {
  await new Promise((settle) => gate.close(settle));
  expect(await take()).toBe("cannot ask the gate of T0: no such file or directory");
  expect(agent.done.slice(-2)).toEqual([FREEZE, THAW]);
});

it("is left alone when the backup is cancelled meanwhile", async () => {
  const cancel = new AbortController();
  keep = () => cancel.abort(new Error("enough"));
  expect(await take(cancel.signal)).toBe("enough");
  expect(agent.done.slice(-2)).toEqual([FREEZE, THAW]);
});
