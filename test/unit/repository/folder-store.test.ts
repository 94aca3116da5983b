import * as fs from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { FolderStore } from "../../../src/repository/store/folder-store.js";
import { storeSuite, type StoreUnderTest } from "../../support/repository/store-suite.js";

function open(isBlocking: boolean): () => Promise<StoreUnderTest> {
  return () => {
    const path = fs.mkdtempSync(join(tmpdir(), "cowcatcher-store-"));
    const description = { kind: "folder", name: path, path } as const;
    return Promise.resolve({
      store: new FolderStore(description, isBlocking),
      other: new FolderStore(description, !isBlocking),
      end: () => fs.promises.rm(path, { recursive: true }),
    });
  };
}

describe("a folder, by blocking calls", () => storeSuite(open(true)));
describe("a folder, through the thread pool", () => storeSuite(open(false)));

describe("a folder", () => {
  it("shows nothing of what is still being written, and leaves nothing of what failed", async () => {
    const { store, end } = await open(true)();
    const path = store.name;
    fs.mkdirSync(join(path, "tmp"));
    fs.writeFileSync(join(path, "tmp", "host-1-abc"), "half");
    for await (const batch of store.list("")) expect(batch).toEqual([]);
    fs.writeFileSync(join(path, "file"), "x");
    await expect(store.put("file/under", Buffer.from("x"), { durable: true })).rejects.toMatchObject({
      code: "IO",
    });
    expect(fs.readdirSync(join(path, "tmp"))).toEqual(["host-1-abc"]);
    await end();
  });

  it("removes the litter of a day ago, and nothing younger", async () => {
    const { store, end } = await open(false)();
    const path = store.name;
    fs.mkdirSync(join(path, "tmp"));
    for (const name of ["old", "young"]) fs.writeFileSync(join(path, "tmp", name), "half");
    const longAgo = Date.now() / 1000 - 25 * 3600;
    fs.utimesSync(join(path, "tmp", "old"), longAgo, longAgo);
    expect(await store.removeLitter()).toBe(1);
    expect(fs.readdirSync(join(path, "tmp"))).toEqual(["young"]);
    await end();
  });

  it("a folder that has become empty goes, and comes again", async () => {
    const { store, end } = await open(false)();
    await store.put("claims/run/1", Buffer.from("x"), { durable: false });
    await store.delete("claims/run/1");
    expect(fs.readdirSync(join(store.name, "claims"))).toEqual([]);
    await store.put("claims/run/2", Buffer.from("x"), { durable: false });
    expect(await store.head("claims/run/2")).toBeDefined();
    await end();
  });
});
