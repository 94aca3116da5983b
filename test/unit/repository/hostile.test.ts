// What a repository may meet: a clock that was set back, two backups of one time, a store that is full, two that verify at
// once.
import { createHash } from "node:crypto";
import { describe, expect, it } from "vitest";
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

function disk(seed: string, count = 3): Buffer[] {
  return Array.from({ length: count }, (_, index) =>
    createHash("sha512").update(`${seed} ${index}`).digest().subarray(0, CHUNK_BYTES),
  );
}

const IN_2030_NS = 1_900_000_000_000_000_000n;

describe("a clock that was set back", () => {
  it("the newest backup is the latest, and the one that keep-last 1 keeps", async () => {
    const store = new MortalStore(new Map());
    const repository = smallRepository(store);
    const first = await backUp(store, disk("first"), { timeNs: IN_2030_NS });
    const second = await backUp(store, disk("second"), { timeNs: IN_2030_NS - 10n ** 15n });
    expect(second.time > first.time).toBe(true);
    const latest = await repository.find({ group: "vm", time: "latest" });
    expect(latest.time).toBe(second.time);
    expect(latest.clock).toBe("2030-03-06T04:00:00.000000000Z");
    await forgetByRules(repository, "vm", { last: 1 }, { dryRun: false });
    expect((await readBack(store, second)).equals(Buffer.concat(disk("second")))).toBe(true);
    // Another group does not know that clock.
    const other = await backUp(store, disk("other"), { group: "other", timeNs: IN_2030_NS + 5n });
    expect((await repository.readManifest(other)).clock).toBeNull();
  });
});

describe("two backups of one group at one time", () => {
  it("are two backups, or the second fails; the first stays as it is", async () => {
    const objects: Objects = new Map();
    const store = new MortalStore(objects);
    const first = await backUp(store, disk("first"), { timeNs: IN_2030_NS + 7000n });
    const manifest = `groups/vm/${first.time}/manifest`;
    const index = `groups/vm/${first.time}/disk.index`;
    const [heldManifest, heldIndex] = [manifest, index].map((name) => objects.get(name));
    // As seen by one that looked before the first had put anything: what it finds when it puts its own.
    const inAnotherProcess = (): Promise<unknown> => backUp(new MortalStore(new Map()), [], { timeNs: 1n });
    for (const hidden of [[manifest, index], [manifest]]) {
      for (const name of hidden) objects.delete(name);
      await inAnotherProcess();
      const late = new LateObjects(objects, { [manifest]: heldManifest, [index]: heldIndex });
      await expect(backUp(late, disk("second"), { timeNs: IN_2030_NS + 7000n })).rejects.toMatchObject({
        code: "EXISTS",
      });
      expect(objects.get(manifest)).toBe(heldManifest);
      expect(objects.get(index)).toBe(heldIndex);
    }
    expect((await readBack(store, first)).equals(Buffer.concat(disk("first")))).toBe(true);
  });
});

/** Objects that another one puts in the moment before this user's own put of that name. */
class LateObjects extends MortalStore {
  constructor(
    objects: Objects,
    readonly late: Record<string, { content: Buffer; changedMs: number } | undefined>,
  ) {
    super(objects);
  }

  override put(name: string, content: Uint8Array): ReturnType<MortalStore["put"]> {
    const [, group, time] = name.split("/");
    if (group === "vm" && time !== undefined) {
      for (const [other, object] of Object.entries(this.late)) {
        if (object !== undefined && other.includes(time)) this.objects.set(other, object);
      }
    }
    return super.put(name, content);
  }
}

describe("a store that is full", () => {
  const used = (objects: Objects): number =>
    [...objects.values()].reduce((sum, { content }) => sum + content.length, 0);

  it("a backup fails and leaves the others whole; forget and prune make room", async () => {
    const objects: Objects = new Map();
    const first = await backUp(new MortalStore(objects), disk("first", 40));
    const second = await backUp(new MortalStore(objects), disk("second", 4));
    for (const spare of [0, 300, 600, 900, 1200, 2500]) {
      const full = new MortalStore(objects, { capacityBytes: used(objects) + spare });
      await expect(backUp(full, disk("third", 40))).rejects.toMatchObject({ code: "NO_SPACE" });
      expect((await readBack(full, first)).equals(Buffer.concat(disk("first", 40)))).toBe(true);
    }
    expect([...objects.keys()].filter((name) => /^(?:locks|claims)/.test(name))).toEqual([]);
    const full = new MortalStore(objects, { capacityBytes: used(objects) });
    const repository = smallRepository(full);
    await forgetByRules(repository, "vm", { last: 1 }, { dryRun: false });
    const { deleted } = await prune(repository, { dryRun: false, heartbeatMs: 0, judge: allAreDead });
    expect(deleted).toBeGreaterThanOrEqual(40);
    expect((await readBack(full, second)).equals(Buffer.concat(disk("second", 4)))).toBe(true);
    await backUp(full, disk("third", 8));
  });

  it("verify names the damage, though it has no room to set anything aside", async () => {
    const objects: Objects = new Map();
    const { time } = await backUp(new MortalStore(objects), disk("first"));
    const [chunk] = [...objects].filter(([name]) => name.startsWith("chunks/"));
    chunk[1].content[40] ^= 1;
    for (const spare of [0, 400, 900]) {
      const full = new MortalStore(objects, { capacityBytes: used(objects) + spare });
      const result = await verify(smallRepository(full), { samplePercent: 100, heartbeatMs: 0 });
      expect(result).toMatchObject({ badChunks: 1, damaged: [{ group: "vm", time }] });
    }
  });
});

describe("two that verify at once, and a backup that heals between them", () => {
  it("neither deletes what was healed", async () => {
    const objects: Objects = new Map();
    const store = new MortalStore(objects);
    const content = disk("first");
    const backup = await backUp(store, content);
    const [name] = [...objects.keys()].filter((found) => found.startsWith("chunks/"));
    objects.get(name ?? "")!.content[40] ^= 1;
    const slow = new SlowVerify(objects, async () => {
      expect(await verify(smallRepository(store), { samplePercent: 100, heartbeatMs: 0 })).toMatchObject({
        setAside: 1,
      });
      await backUp(store, content);
    });
    const result = await verify(smallRepository(slow), { samplePercent: 100, heartbeatMs: 0 });
    expect(result).toMatchObject({ badChunks: 1, setAside: 0 });
    expect((await readBack(store, backup)).equals(Buffer.concat(content))).toBe(true);
  });
});

/** Held up when it has found what is bad, and has condemned nothing yet. */
class SlowVerify extends MortalStore {
  #meanwhile: (() => Promise<void>) | undefined;

  constructor(objects: Objects, meanwhile: () => Promise<void>) {
    super(objects);
    this.#meanwhile = meanwhile;
  }

  override async put(name: string, content: Uint8Array): ReturnType<MortalStore["put"]> {
    if (name.includes(".condemned-")) {
      const meanwhile = this.#meanwhile;
      this.#meanwhile = undefined;
      await meanwhile?.();
    }
    return super.put(name, content);
  }
}
