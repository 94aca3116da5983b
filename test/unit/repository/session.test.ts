// A backup that is given up while it is being completed: there is one or there is none, and the store agrees.
import { expect, it } from "vitest";
import { CHUNK_DONE } from "../../../src/repository/backup/disk-chunks.js";
import { BackupSession } from "../../../src/repository/backup/session.js";
import { CowcatcherError } from "../../../src/errors.js";
import { MortalStore, type Objects } from "../../support/repository/mortal-store.js";
import { CHUNK_BYTES, smallRepository } from "../../support/repository/small-repository.js";

const GIVEN_UP = new CowcatcherError({ code: "CANCELLED", object: "vm", problem: "given up" });

/** Gives the backup up at the `call`th call of its completion. @returns whether it came in time */
async function giveUpAt(call: number): Promise<{ isGivenUp: boolean; isReached: boolean; names: string[] }> {
  const objects: Objects = new Map();
  const store = new MortalStore(objects);
  const held: { session?: BackupSession } = {};
  let aborting: Promise<void> | undefined;
  let callCount = -Infinity;
  const counted = new Proxy(store, {
    get(target, name) {
      const value: unknown = Reflect.get(target, name, target);
      if (typeof value !== "function") return value;
      return (...args: unknown[]): unknown => {
        if (++callCount === call) aborting = held.session?.abort(GIVEN_UP);
        return (value as (...given: unknown[]) => unknown).apply(target, args);
      };
    },
  });
  const session = await BackupSession.begin(smallRepository(counted), {
    group: "vm",
    diskCount: 1,
    totalBytes: CHUNK_BYTES,
    tool: "test",
    heartbeatMs: 0,
  });
  held.session = session;
  const disk = session.addDisk("disk", CHUNK_BYTES, "raw");
  new Uint8Array(disk.states)[0] = CHUNK_DONE;
  await session.putIndex(disk);
  callCount = 0;
  const outcome = await session.diskDone().then(
    () => false,
    (error: unknown) => error === GIVEN_UP,
  );
  const isReached = aborting !== undefined;
  await aborting;
  const settled = await session.completed.then(
    () => false,
    () => true,
  );
  expect(settled).toBe(outcome);
  return { isGivenUp: outcome, isReached, names: [...objects.keys()] };
}

it("has either its manifest or nothing, whenever it is given up", async () => {
  const outcomes = new Set<boolean>();
  for (let call = 1; ; call++) {
    const { isGivenUp, isReached, names } = await giveUpAt(call);
    if (!isReached) break;
    outcomes.add(isGivenUp);
    expect(names.filter((name) => name.startsWith("groups/")).length).toBe(isGivenUp ? 0 : 2);
    expect(names.filter((name) => name.startsWith("locks/"))).toEqual([]);
  }
  expect(outcomes).toEqual(new Set([true, false]));
});
