// Whoever works in a repository dies at each of his calls in turn: no complete backup is harmed, and the next one works.
import { createHash } from "node:crypto";
import { describe, expect, it } from "vitest";
import type { KeySource } from "../../../src/repository/format/keys.js";
import { Repository } from "../../../src/repository/repository.js";
import { forgetByRules } from "../../../src/repository/upkeep/forget.js";
import { prune } from "../../../src/repository/upkeep/prune.js";
import { verify } from "../../../src/repository/upkeep/verify.js";
import { MortalStore, type Objects } from "../../support/repository/mortal-store.js";
import {
  allAreDead,
  backUp,
  CHUNK_BYTES,
  readBack,
  smallRepository,
} from "../../support/repository/small-repository.js";

const MAX_CALLS = 400;

function chunk(number: number): Buffer {
  return createHash("sha512").update(`chunk ${number}`).digest().subarray(0, CHUNK_BYTES);
}

const OLD = [chunk(1), chunk(2), chunk(3)];
const NEW = [chunk(1), chunk(4), chunk(5)];
const NEXT = [chunk(4), chunk(6), chunk(2)];

/** Two backups, a damaged chunk's place, and what a forgotten backup has left for prune. */
async function before(): Promise<{ objects: Objects; kept: { group: string; time: string } }> {
  const objects: Objects = new Map();
  const store = new MortalStore(objects);
  await backUp(store, [chunk(7), chunk(8), chunk(9)]);
  const kept = await backUp(store, OLD);
  await forgetByRules(smallRepository(store), "vm", { last: 1 }, { dryRun: false });
  return { objects, kept };
}

function clone(objects: Objects): Objects {
  return new Map([...objects].map(([name, object]) => [name, { ...object }]));
}

/** Runs `work` until it ends or its user is dead. @returns whether it ended */
async function untilDeath(
  store: MortalStore,
  work: (store: MortalStore) => Promise<unknown>,
): Promise<boolean> {
  const death = new Promise<false>((resolve) => (store.onDeath = () => resolve(false)));
  return Promise.race([work(store).then(() => true as const), death]);
}

async function checkWhatIsLeft(
  objects: Objects,
  kept: { group: string; time: string },
  mayBeForgotten: boolean,
): Promise<void> {
  const store = new MortalStore(objects);
  const repository = smallRepository(store);
  // What a dead backup completed is as good as any.
  const complete = await repository.backups();
  for (const entry of complete) await readBack(store, entry);
  if (!mayBeForgotten) expect((await readBack(store, kept)).equals(Buffer.concat(OLD))).toBe(true);
  const next = await backUp(store, NEXT);
  await prune(repository, { dryRun: false, heartbeatMs: 0, judge: allAreDead });
  expect((await readBack(store, next)).equals(Buffer.concat(NEXT))).toBe(true);
  for (const entry of complete) await readBack(store, entry);
  expect(await verify(repository, { samplePercent: 100, heartbeatMs: 0 })).toMatchObject({ damaged: [] });
}

describe.each([
  ["before the call happens", false],
  ["after the call happened", true],
])("killed at every call, %s", (_when, lastCallHappens) => {
  it.each<[string, (store: MortalStore) => Promise<unknown>, boolean]>([
    ["backup", (store) => backUp(store, NEW), false],
    [
      "prune",
      (store) => prune(smallRepository(store), { dryRun: false, heartbeatMs: 0, judge: allAreDead }),
      false,
    ],
    [
      "forget",
      (store) => forgetByRules(smallRepository(store), "other", { last: 1 }, { dryRun: false }),
      false,
    ],
    ["verify", (store) => verify(smallRepository(store), { samplePercent: 100, heartbeatMs: 0 }), false],
  ])("%s", { timeout: 120_000 }, async (work, run) => {
    const { objects: clean, kept } = await before();
    if (work === "forget") {
      for (let i = 0; i < 2; i++) await backUp(new MortalStore(clean), NEW, { group: "other" });
    }
    if (work === "verify") {
      // A bad object that nothing good depends on: it is set aside.
      const bad = await backUp(new MortalStore(clean), NEW, { group: "bad" });
      await forgetByRules(smallRepository(new MortalStore(clean)), "bad", { last: 1 }, { dryRun: false });
      expect(bad.group).toBe("bad");
    }
    for (let call = 1; call <= MAX_CALLS; call++) {
      const objects = clone(clean);
      const store = new MortalStore(objects, { diesAtCall: call, lastCallHappens });
      const ended = await untilDeath(store, run);
      await checkWhatIsLeft(objects, kept, false);
      if (ended) {
        expect(call).toBeGreaterThan(4);
        return;
      }
    }
    throw new Error(`no end within ${MAX_CALLS} calls`);
  });

  it("verify that sets a bad chunk aside: the next backup heals it", { timeout: 120_000 }, async () => {
    const { objects: clean, kept } = await before();
    const bad = [...clean.keys()].find((name) => {
      const object = clean.get(name)?.content;
      return name.startsWith("chunks/") && object?.includes(chunk(2));
    });
    clean.get(bad ?? "")!.content[50] ^= 1;
    for (let call = 1; call <= MAX_CALLS; call++) {
      const objects = clone(clean);
      const store = new MortalStore(objects, { diesAtCall: call, lastCallHappens });
      const ended = await untilDeath(store, (mortal) =>
        verify(smallRepository(mortal), { samplePercent: 100, heartbeatMs: 0 }),
      );
      const after = new MortalStore(objects);
      const options = { samplePercent: 100, heartbeatMs: 0 };
      await verify(smallRepository(after), options);
      // With the dead verify's list in place its names are kept off, and the content gets another one.
      await backUp(after, OLD);
      expect((await readBack(after, kept)).equals(Buffer.concat(OLD))).toBe(true);
      if (ended) return;
    }
    throw new Error("no end");
  });

  it(
    "init and key change: it opens with the old or the new key, or init works again",
    { timeout: 120_000 },
    async () => {
      const key = (byte: number): KeySource => ({ kind: "file", path: "", content: Buffer.alloc(32, byte) });
      const options = { chunkBytes: 1024 * 1024, compression: null, key: key(1) };
      const address = "/memory";
      const open = (store: MortalStore, source: KeySource): Promise<Repository> =>
        Repository.open(address, () => Promise.resolve(source), false, store);
      for (let call = 1, ended = false; !ended && call < MAX_CALLS; call++) {
        const objects: Objects = new Map();
        const mortal = new MortalStore(objects, { diesAtCall: call, lastCallHappens });
        ended = await untilDeath(mortal, (store) => Repository.init(address, options, store));
        const store = new MortalStore(objects);
        if (!objects.has("config")) await Repository.init(address, options, store);
        const repository = await open(store, key(1));
        // What a killed init has left is no key of this one, and does not let the only one be removed.
        const [only, other] = await repository.keys();
        expect(other).toBeUndefined();
        await expect(repository.removeKey(only?.id ?? "")).rejects.toThrow("only key");
      }
      const clean: Objects = new Map();
      await Repository.init(address, options, new MortalStore(clean));
      for (let call = 1, ended = false; !ended && call < MAX_CALLS; call++) {
        const objects = clone(clean);
        ended = await untilDeath(
          new MortalStore(objects, { diesAtCall: call, lastCallHappens }),
          async (store) => {
            const repository = await open(store, key(1));
            const old = await repository.findKey(key(1));
            await repository.addKey(key(2));
            await repository.removeKey(old);
          },
        );
        const opened = await Promise.allSettled(
          [1, 2].map((byte) => open(new MortalStore(objects), key(byte))),
        );
        expect(opened.some(({ status }) => status === "fulfilled")).toBe(true);
        if (ended) expect(opened.map(({ status }) => status)).toEqual(["rejected", "fulfilled"]);
      }
    },
  );
});
