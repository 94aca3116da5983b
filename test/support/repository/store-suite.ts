// What every store must do: the same tests over a folder and over a bucket.
import { randomBytes } from "node:crypto";
import { afterEach, beforeEach, expect, it } from "vitest";
import { listNames, type Store } from "../../../src/repository/store/store.js";

export interface StoreUnderTest {
  store: Store;
  /** A second door to the same objects, as of another process. */
  other: Store;
  end: () => Promise<void>;
}

const KEEP = { durable: true };
const MAX = 64 * 1024 * 1024;

export function storeSuite(open: () => Promise<StoreUnderTest>): void {
  let it_: StoreUnderTest;
  let store: Store;
  let other: Store;
  beforeEach(async () => {
    it_ = await open();
    ({ store, other } = it_);
  });
  afterEach(() => it_.end());

  it("gives back what was put, whole and in ranges", async () => {
    const content = randomBytes(300_000);
    expect(await store.put("chunks/ab/one", content, KEEP)).toBe("stored");
    expect((await other.get("chunks/ab/one", MAX)).equals(content)).toBe(true);
    const range = { offsetBytes: 1000, lengthBytes: 70_000 };
    expect((await other.get("chunks/ab/one", MAX, { range })).equals(content.subarray(1000, 71_000))).toBe(
      true,
    );
    const tail = { offsetBytes: 299_999, lengthBytes: 50 };
    expect((await other.get("chunks/ab/one", MAX, { range: tail })).equals(content.subarray(299_999))).toBe(
      true,
    );
    const memory = Buffer.alloc(400_000, 1);
    expect((await other.get("chunks/ab/one", memory.length, { memory })).equals(content)).toBe(true);
  });

  it("takes an empty object", async () => {
    await store.put("a/empty", new Uint8Array(0), KEEP);
    expect(await other.get("a/empty", MAX)).toHaveLength(0);
    expect(await other.head("a/empty")).toMatchObject({ sizeBytes: 0 });
  });

  it("keeps the first of two puts of one name, and says so to the second", async () => {
    expect(await store.put("a/x", Buffer.from("first"), KEEP)).toBe("stored");
    expect(await other.put("a/x", Buffer.from("second"), KEEP)).toBe("present");
    expect((await store.get("a/x", MAX)).toString()).toBe("first");
  });

  it("of many exclusive puts at one time lets exactly one be the first", async () => {
    const outcomes = await Promise.all(
      Array.from({ length: 12 }, (_, index) =>
        (index % 2 === 0 ? store : other).put("a/y", Buffer.from(`${index}`), {
          durable: true,
          exclusive: true,
        }),
      ),
    );
    expect(outcomes.filter((outcome) => outcome === "stored")).toHaveLength(1);
    expect((await store.get("a/y", MAX)).toString()).toBe(String(outcomes.indexOf("stored")));
  });

  it("says of an object that is not there that it is not", async () => {
    expect(await store.head("a/none")).toBeUndefined();
    await expect(store.get("a/none", MAX)).rejects.toMatchObject({ code: "NOT_FOUND" });
    await store.delete("a/none");
  });

  it("does not read more than it may", async () => {
    await store.put("a/big", Buffer.alloc(5000), KEEP);
    await expect(store.get("a/big", 4999)).rejects.toMatchObject({ code: "LIMIT" });
  });

  it("lists by prefix of names, and shows at once what another has put or deleted", async () => {
    for (const name of ["a/b", "a/bc", "a/b2/c", "b/a", "a/c"]) await store.put(name, Buffer.from("x"), KEEP);
    expect((await listNames(other, "a/b", 10)).sort()).toEqual(["a/b", "a/b2/c", "a/bc"]);
    expect((await listNames(other, "a/", 10)).sort()).toEqual(["a/b", "a/b2/c", "a/bc", "a/c"]);
    expect(await listNames(other, "zz/", 10)).toEqual([]);
    await other.delete("a/b");
    expect((await listNames(store, "a/b", 10)).sort()).toEqual(["a/b2/c", "a/bc"]);
    expect(await store.head("a/b")).toBeUndefined();
  });

  it("lists more than one page, with sizes if asked", async () => {
    const names = Array.from({ length: 2300 }, (_, index) => `many/${index}`);
    for (let at = 0; at < names.length; at += 50) {
      const some = names.slice(at, at + 50);
      await Promise.all(some.map((name) => store.put(name, Buffer.alloc(at % 7), { durable: false })));
    }
    expect(new Set(await listNames(other, "many/", 3000))).toEqual(new Set(names));
    let bytes = 0;
    for await (const batch of other.list("many/", { details: () => true })) {
      for (const { sizeBytes } of batch) bytes += sizeBytes;
    }
    expect(bytes).toBe(names.reduce((sum, _, index) => sum + ((Math.floor(index / 50) * 50) % 7), 0));
    await expect(listNames(other, "many/", 100)).rejects.toMatchObject({ code: "LIMIT" });
  });

  it("touch makes an object, or makes it anew with a later time", async () => {
    await store.touch("locks/r", Buffer.from("one"));
    const first = await other.head("locks/r");
    await new Promise((resolve) => setTimeout(resolve, 1100));
    await store.touch("locks/r", Buffer.from("two"));
    const second = await other.head("locks/r");
    expect((await other.get("locks/r", MAX)).toString()).toBe("two");
    expect(second?.changedMs).toBeGreaterThan(first?.changedMs ?? Infinity);
  });

  it("flush, also of what others have put under a prefix", async () => {
    await store.put("chunks/00/a", Buffer.from("x"), KEEP);
    await other.flush("chunks/");
    await store.flush();
    expect(await other.head("chunks/00/a")).toBeDefined();
  });

  it("refuses a name that would leave its place", async () => {
    for (const name of ["../x", "a/../x", "/x", "a//x", ".x", ""]) {
      await expect(store.put(name, Buffer.from("x"), KEEP)).rejects.toMatchObject({ code: "INTERNAL" });
    }
  });
}
