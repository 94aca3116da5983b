import * as fs from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import {
  overlap,
  type Storage,
  storageAt,
  storageBelow,
  storageOfFd,
} from "../../../src/block/file/storage.js";

let folder: string;
const at = (...names: string[]): string => join(folder, ...names);
beforeEach(() => {
  folder = fs.mkdtempSync(join(tmpdir(), "cowcatcher-storage-"));
});
afterEach(() => fs.rmSync(folder, { recursive: true }));

async function found(path: string): Promise<Storage> {
  const storage = await storageAt(path);
  if (storage === null) throw new Error(`nothing at ${path}`);
  return storage;
}

describe("a file", () => {
  it("is one by whatever name, and by its descriptor when the name has gone", async () => {
    fs.writeFileSync(at("a"), "");
    fs.linkSync(at("a"), at("hard"));
    fs.symlinkSync(at("a"), at("soft"));
    fs.writeFileSync(at("other"), "");
    const fd = fs.openSync(at("a"), "r");
    try {
      const file = await storageOfFd(fd);
      for (const name of ["a", "hard", "soft"]) expect(overlap(file, await found(at(name)))).toBe(true);
      expect(overlap(file, await found(`/proc/self/fd/${fd}`))).toBe(true);
      expect(overlap(file, await found(at("other")))).toBe(false);
      fs.renameSync(at("other"), at("a"));
      expect(overlap(file, await found(at("a")))).toBe(false);
      expect(overlap(file, await found(at("hard")))).toBe(true);
    } finally {
      fs.closeSync(fd);
    }
  });

  it("that is not there is nothing", async () => {
    expect(await storageAt(at("none"))).toBeNull();
    expect(await storageAt(at("none", "deeper"))).toBeNull();
    fs.symlinkSync(at("none"), at("dangling"));
    expect(await storageAt(at("dangling"))).toBeNull();
  });
});

/** A tree of devices as sysfs has it: folders by place, and links to them by number. */
describe("a block device", () => {
  const numbers = new Map<string, string>();
  const root = (): string => at("by-number");

  function device(place: string, number: string, attributes: Record<string, string> = {}): void {
    fs.mkdirSync(at("devices", place, "slaves"), { recursive: true });
    fs.mkdirSync(root(), { recursive: true });
    fs.symlinkSync(at("devices", place), join(root(), number));
    numbers.set(place, number);
    for (const [name, text] of Object.entries({ dev: number, ...attributes })) {
      fs.mkdirSync(join(at("devices", place), name, ".."), { recursive: true });
      fs.writeFileSync(at("devices", place, name), `${text}\n`);
    }
  }

  /** `upper` is made of `lower`. */
  function slave(upper: string, lower: string): void {
    fs.symlinkSync(at("devices", lower), at("devices", upper, "slaves", lower.replaceAll("/", "!")));
  }

  async function storage(place: string): Promise<Storage> {
    const number = numbers.get(place) ?? "";
    return { id: `device ${number}`, below: await storageBelow(number, root()), isBlockDevice: true };
  }

  async function doOverlap(a: string, b: string): Promise<boolean> {
    const [first, second] = [await storage(a), await storage(b)];
    expect(overlap(first, second)).toBe(overlap(second, first));
    return overlap(first, second);
  }

  beforeEach(() => {
    device("sda", "8:0");
    device("sda/sda1", "8:1", { partition: "1" });
    device("sda/sda2", "8:2", { partition: "2" });
    device("sdb", "8:16");
    device("dm-0", "253:0");
    device("dm-1", "253:1");
    device("md0", "9:0");
    slave("dm-0", "sda/sda2");
    slave("dm-1", "dm-0");
    slave("md0", "sdb");
    slave("md0", "dm-1");
  });

  it("overlaps with the disk that it is a partition of, and not with another partition", async () => {
    expect(await doOverlap("sda", "sda/sda1")).toBe(true);
    expect(await doOverlap("sda/sda2", "sda/sda1")).toBe(false);
    expect(await doOverlap("sdb", "sda/sda1")).toBe(false);
  });

  it("overlaps with all that it is mapped to", async () => {
    expect(await doOverlap("dm-0", "sda/sda2")).toBe(true);
    expect(await doOverlap("dm-1", "sda")).toBe(true);
    expect(await doOverlap("dm-1", "sda/sda1")).toBe(false);
    expect(await doOverlap("md0", "sda/sda2")).toBe(true);
    expect(await doOverlap("md0", "sdb")).toBe(true);
    expect(await doOverlap("dm-1", "sdb")).toBe(false);
  });

  it("overlaps with the file under its loop device, and under that one's partitions", async () => {
    fs.writeFileSync(at("image"), "");
    device("loop0", "7:0", { "loop/backing_file": at("image") });
    device("loop0/loop0p1", "259:0", { partition: "1" });
    device("loop1", "7:1", { "loop/backing_file": `${at("gone")} (deleted)` });
    device("loop2", "7:2", { "loop/backing_file": `${at("image")} (deleted)` });
    const file = await found(at("image"));
    expect(overlap(file, await storage("loop0"))).toBe(true);
    expect(overlap(file, await storage("loop0/loop0p1"))).toBe(true);
    expect(overlap(file, await storage("loop1"))).toBe(false);
    expect(overlap(file, await storage("loop2"))).toBe(true);
  });

  it("that the system does not describe lies on nothing", async () => {
    expect([...(await storageBelow("99:9", root()))]).toEqual([]);
  });

  it("is described even by a tree that leads back to itself", async () => {
    slave("sdb", "md0");
    expect(await doOverlap("md0", "sdb")).toBe(true);
  });
});
