// The guest is out of the target's reach: whatever call to the target's side does not return, in whatever step of a live
// backup's life, no guest waits for it. test/support/dead-storage.c is the storage; test/long has the whole matrix.
import { afterAll, describe, expect, it } from "vitest";
import { DeadStorage, type LoggedCall, type Scenario, survive } from "../../support/dead-storage.js";
import { stopAll } from "../../support/server.js";

afterAll(stopAll);

/** Every step that a backup can have: a replaced target with attributes, verified, a spill and a T0 view beside it. */
const EVERYTHING: Scenario = {
  name: "everything",
  args: ["--verify", "--direct"],
  serveArgs: ["--snapshot-export"],
  replaces: true,
  spills: true,
};

const CANCELLED: Scenario = { name: "cancelled", args: [], spills: true, cancels: true };

const LIVES: Scenario[] = [EVERYTHING, CANCELLED];

/** What the target's side is asked for in `everything`. A call that is new there belongs into this list. */
const CALLS = [
  ...["stat", "realpath", "readlink", "scandir", "statfs"],
  ...["open", "fstat", "fcntl", "linkat", "flistxattr", "fgetxattr", "fchmod", "fchown", "ftruncate"],
  ...["pwrite", "pread", "fallocate", "lseek", "fadvise", "fdatasync", "rename", "unlink", "close"],
];

function onMain(calls: readonly LoggedCall[]): LoggedCall[] {
  return calls.filter(({ thread }) => thread === "main");
}

describe("no call to the target's side is the main thread's", () => {
  it.concurrent.each(LIVES)("in the life of $name", async (scenario) => {
    const storage = await DeadStorage.start(scenario);
    const { disk, other } = await storage.guests();
    const backup = storage.backup();
    await storage.play(backup, disk);
    const { code, stderr } = await backup.end();
    expect(code, stderr).toBe(scenario.cancels === true ? 1 : 0);
    await Promise.all([disk.quit(), other.quit()]);
    expect((await storage.server.stop()).code).toBe(0);
    const calls = storage.calls();
    expect(onMain(calls)).toEqual([]);
    expect(calls.length).toBeGreaterThan(20);
    if (scenario === EVERYTHING) expect(CALLS).toEqual(expect.arrayContaining(namesOf(calls)));
    expect(storage.leftovers()).toEqual([]);
  });
});

function namesOf(calls: readonly LoggedCall[]): string[] {
  return [...new Set(calls.map(({ call }) => call))];
}

describe("storage that does not answer from", () => {
  // Given its name: test/long has all the others.
  it.concurrent.each([
    { scenario: EVERYTHING, call: "rename", nth: 0 },
    // Given up.
    { scenario: CANCELLED, call: "unlink", nth: 0 },
  ])("call $nth to $call of a backup that is $scenario.name holds up nobody", async (death) => {
    await survive(death.scenario, death);
  });
});

it("a server is ended while its target's storage does not answer", async () => {
  const storage = await DeadStorage.start(CANCELLED, { call: "pwrite", nth: 10 });
  const { disk, other } = await storage.guests();
  const backup = storage.backup();
  await storage.play(backup, disk);
  expect(storage.isDead).toBe(true);
  await Promise.all([disk.quit(), other.quit()]);
  expect((await storage.server.stop()).code).toBe(0);
});
