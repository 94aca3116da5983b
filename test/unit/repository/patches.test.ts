// Chunks as patches of older ones: what is stored, what comes back, and what is noticed. Chunks of 64 bytes, so blocks of one.
import { randomBytes } from "node:crypto";
import { describe, expect, it } from "vitest";
import { PATCH_ENTRY_BYTES, PatchTable } from "../../../src/repository/format/patch-table.js";
import { decodeIndex, encodeIndex } from "../../../src/repository/format/index.js";
import { parseChunkName } from "../../../src/repository/format/names.js";
import { removeBackup } from "../../../src/repository/upkeep/forget.js";
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

const ALL = { samplePercent: 100, heartbeatMs: 0 };

interface Fixture {
  store: MortalStore;
  objects: Objects;
  chunks: () => string[];
  kindOf: (name: string) => string;
}

function fixture(): Fixture {
  const objects: Objects = new Map();
  return {
    store: new MortalStore(objects),
    objects,
    chunks: () => [...objects.keys()].filter((name) => parseChunkName(name) !== undefined),
    kindOf: (name) => objects.get(name)?.content.toString("latin1", 0, 8) ?? "",
  };
}

/** The chunk with `count` of its bytes changed, from `first` on. */
function changed(chunk: Buffer, first: number, count = 1): Buffer {
  const copy = Buffer.from(chunk);
  for (let at = first; at < first + count; at++) copy[at] = (copy[at] ?? 0) ^ 0xff;
  return copy;
}

/** A chunk of which only [first, +count) is as it is on the disk: nothing else may be looked at. */
function onlyPart(chunk: Buffer, first: number, count: number): Buffer {
  const copy = randomBytes(chunk.length);
  chunk.copy(copy, first, first, first + count);
  return copy;
}

async function mapOf(store: MortalStore, name: { group: string; time: string }) {
  const repository = smallRepository(store);
  return repository.readIndex(await repository.readManifest(name), "disk");
}

describe("a backup of a disk of which little has changed", () => {
  it.each([
    ["what has changed is not known", false],
    ["what has changed is known", true],
  ])("stores patches, whose base is always a whole chunk: %s", async (_what, isTracked) => {
    const { store, chunks, kindOf } = fixture();
    const disk = [randomBytes(CHUNK_BYTES), randomBytes(CHUNK_BYTES)] as const;
    const given = (chunk: Buffer, first: number, count: number): Buffer =>
      isTracked ? onlyPart(chunk, first, count) : chunk;
    const first = await backUp(store, disk);
    const before = chunks();
    const one = changed(disk[0], 3);
    const second = await backUp(store, [given(one, 3, 1), disk[1]], isTracked ? { changes: [[3, 1]] } : {});
    expect(
      chunks()
        .filter((name) => !before.includes(name))
        .map(kindOf),
    ).toEqual(["cwpatch1"]);
    const two = changed(one, 40, 2);
    const changes = [[40, 2]] as const;
    // With known changes, what had changed before is looked at, too.
    const both = isTracked ? Buffer.concat([one.subarray(0, 4), onlyPart(two, 40, 2).subarray(4)]) : two;
    const third = await backUp(store, [both, disk[1]], isTracked ? { changes } : {});
    const [oldMap, newMap] = [await mapOf(store, first), await mapOf(store, third)];
    expect([...newMap.patches.bases()].map((base) => Buffer.from(base))).toEqual([
      Buffer.from(oldMap.ids.subarray(0, 32)),
    ]);
    expect(await readBack(store, first)).toEqual(Buffer.concat(disk));
    expect(await readBack(store, second)).toEqual(Buffer.concat([one, disk[1]]));
    expect(await readBack(store, third)).toEqual(Buffer.concat([two, disk[1]]));
    expect(await verify(smallRepository(store), ALL)).toMatchObject({ damaged: [], missingChunks: 0 });
  });

  it("stores nothing if nothing has changed since a patch, whichever way that is found out", async () => {
    const { store, chunks } = fixture();
    const disk = randomBytes(CHUNK_BYTES);
    await backUp(store, [disk]);
    const one = changed(disk, 3);
    await backUp(store, [one], { changes: [[3, 1]] });
    const before = chunks();
    // The first of these finds the patch by comparison, the second by the content's id.
    for (let i = 0; i < 2; i++) expect(await readBack(store, await backUp(store, [one]))).toEqual(one);
    expect(await readBack(store, await backUp(store, [one], { changes: [] }))).toEqual(one);
    expect(chunks()).toEqual(before);
  });

  it.each([
    [32, "cwpatch1"],
    [33, "cwchunk1"],
  ])("stores a whole chunk if more than half of it has changed: %i of 64 blocks", async (count, kind) => {
    for (const isTracked of [false, true]) {
      const { store, chunks, kindOf } = fixture();
      const disk = randomBytes(CHUNK_BYTES);
      await backUp(store, [disk]);
      const before = chunks();
      const next = changed(disk, 7, count);
      const name = await backUp(store, [next], isTracked ? { changes: [[7, count]] } : {});
      expect(
        chunks()
          .filter((each) => !before.includes(each))
          .map(kindOf),
      ).toEqual([kind]);
      expect(await readBack(store, name)).toEqual(next);
    }
  });

  it("goes back to the base where the disk does", async () => {
    const { store, chunks } = fixture();
    const disk = randomBytes(CHUNK_BYTES);
    await backUp(store, [disk]);
    await backUp(store, [changed(disk, 3)]);
    const before = chunks();
    const back = await backUp(store, [disk]);
    expect((await mapOf(store, back)).patches.count).toBe(0);
    expect(chunks()).toEqual(before);
  });

  it("stores whole chunks in a repository of version 1", async () => {
    const { store, chunks, kindOf } = fixture();
    const disk = randomBytes(CHUNK_BYTES);
    await backUp(store, [disk], { version: 1 });
    const name = await backUp(store, [changed(disk, 3)], { version: 1 });
    expect(chunks().map(kindOf)).toEqual(["cwchunk1", "cwchunk1"]);
    expect(await readBack(store, name)).toEqual(changed(disk, 3));
  });
});

describe("the base of a patch", () => {
  async function patched() {
    const made = fixture();
    const disk = randomBytes(CHUNK_BYTES);
    const first = await backUp(made.store, [disk]);
    const [base = ""] = made.chunks();
    const second = await backUp(made.store, [changed(disk, 3)]);
    const [patch = ""] = made.chunks().filter((name) => name !== base);
    return { ...made, disk, first, second, base, patch };
  }

  it("stays as long as a backup has the patch, and goes with it", async () => {
    const { store, disk, first, second, chunks } = await patched();
    const repository = smallRepository(store);
    await removeBackup(repository, first);
    const options = { dryRun: false, heartbeatMs: 0, judge: allAreDead };
    expect(await prune(repository, options)).toMatchObject({ deleted: 0, used: 2 });
    expect(await readBack(store, second)).toEqual(changed(disk, 3));
    await removeBackup(repository, second);
    expect(await prune(repository, options)).toMatchObject({ deleted: 2 });
    expect(chunks()).toEqual([]);
  });

  it("that is missing or damaged harms all backups of it, and the next one stores the chunk whole", async () => {
    for (const isMissing of [true, false]) {
      for (const changes of [undefined, [[9, 1]] as const]) {
        const { store, objects, disk, first, second, base } = await patched();
        const object = objects.get(base);
        if (isMissing) objects.delete(base);
        else if (object !== undefined) object.content[60] = (object.content[60] ?? 0) ^ 1;
        const found = await verify(smallRepository(store), ALL);
        expect(found.damaged.map(({ time }) => time).sort()).toEqual([first.time, second.time]);
        for (const name of [first, second]) await expect(readBack(store, name)).rejects.toThrow();
        const next = changed(changed(disk, 3), 9);
        const name = await backUp(store, [next], changes === undefined ? {} : { changes });
        expect(await readBack(store, name)).toEqual(next);
        // The disk has the base's content no more, so the old backups cannot be healed; when it has, they are.
        await backUp(store, [disk]);
        for (const healed of [first, second]) await readBack(store, healed);
      }
    }
  });

  it("is never given out for the patch, nor a patch for a chunk", async () => {
    const { store, objects, second, base, patch } = await patched();
    const [chunkObject, patchObject] = [objects.get(base), objects.get(patch)];
    if (chunkObject === undefined || patchObject === undefined) throw new Error("no objects");
    objects.set(base, patchObject);
    objects.set(patch, chunkObject);
    await expect(readBack(store, second)).rejects.toThrow(/damaged/);
    expect(await verify(smallRepository(store), ALL)).toMatchObject({ badChunks: 2 });
  });

  it("with any bit of the patch flipped, or a part of it cut off, is not given out", async () => {
    const { store, objects, second, patch } = await patched();
    const whole = Buffer.from(objects.get(patch)?.content ?? []);
    for (let bit = 0; bit < whole.length * 8; bit += 3) {
      const content = Buffer.from(whole);
      content[bit >> 3] = (content[bit >> 3] ?? 0) ^ (1 << (bit & 7));
      objects.set(patch, { content, changedMs: 0 });
      await expect(readBack(store, second), `bit ${bit}`).rejects.toThrow(/damaged/);
    }
    for (const length of [0, 31, 32, 48, 90, whole.length - 1]) {
      objects.set(patch, { content: whole.subarray(0, length), changedMs: 0 });
      await expect(readBack(store, second), `${length} bytes`).rejects.toThrow(/damaged/);
    }
  });
});

describe("an index with patches", () => {
  const ids = randomBytes(3 * 32);
  const record = randomBytes(PATCH_ENTRY_BYTES - 8)
    .fill(0, 0, 8)
    .fill(5, 0, 1);
  const content = encodeIndex({
    sizeBytes: 3 * CHUNK_BYTES,
    chunkBytes: CHUNK_BYTES,
    ids,
    patches: PatchTable.from([
      { chunk: 0, record },
      { chunk: 2, record },
    ]),
  });
  const tableAt = content.length - 2 * PATCH_ENTRY_BYTES;

  it("comes back", () => {
    const { patches } = decodeIndex("store", "x.index", content);
    expect([0, 1, 2].map((chunk) => patches.find(chunk) !== undefined)).toEqual([true, false, true]);
    expect(Buffer.from(patches.find(2) ?? [])).toEqual(record);
  });

  it.each<[string, (damaged: Buffer) => void]>([
    ["a count of patches that is another", (damaged) => damaged.writeUInt32LE(1, 24)],
    ["a chunk that there is not", (damaged) => damaged.writeUInt32LE(3, tableAt + PATCH_ENTRY_BYTES)],
    ["chunks out of order", (damaged) => damaged.writeUInt32LE(2, tableAt)],
    ["no block", (damaged) => damaged.fill(0, tableAt + 8, tableAt + 16)],
    ["too many blocks", (damaged) => damaged.fill(255, tableAt + 8, tableAt + 16)],
    ["no base", (damaged) => damaged.fill(0, tableAt + 16, tableAt + 48)],
    ["a patch of a hole", (damaged) => damaged.fill(0, 32, 64)],
    ["bytes that are to be 0", (damaged) => damaged.writeUInt32LE(1, 28)],
  ])("is refused with %s", (_what, damage) => {
    const damaged = Buffer.from(content);
    damage(damaged);
    expect(() => decodeIndex("store", "x.index", damaged)).toThrow(/damaged/);
  });
});
