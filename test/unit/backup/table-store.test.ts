// Tables are zero for each job, small and large ones, and are one job's at a time.

import { describe, expect, it, vi } from "vitest";
import { TableStore } from "../../../src/backup/memory/table-store.js";
import { libc } from "../../../src/native/libc.js";
import { MiB } from "../../../src/units.js";

function isZero(memory: SharedArrayBuffer): boolean {
  return Buffer.from(memory).equals(Buffer.alloc(memory.byteLength));
}

async function untilFree(store: TableStore, count: number): Promise<void> {
  await vi.waitFor(() => expect(store.freeCount).toBe(count), { interval: 1, timeout: 60_000 });
}

describe("a released table", () => {
  // Odd lengths end inside a word and inside a page; the last one is cleared in two pieces.
  for (const bytes of [1, 13, 4096, MiB, MiB + 1, 3 * MiB + 4097, 20 * MiB + 77]) {
    it.runIf(bytes <= MiB || libc !== null)(`of ${bytes} bytes is the next job's, all zero`, async () => {
      const store = new TableStore();
      const lease = store.lease();
      const table = lease.allocate(bytes);
      expect(table.byteLength).toBe(bytes);
      new Uint8Array(table).fill(0xff);
      lease.release();
      lease.release();
      await untilFree(store, 1);
      const next = store.lease();
      expect(next.allocate(bytes)).toBe(table);
      expect(isZero(table)).toBe(true);
      expect(next.allocate(bytes)).not.toBe(table);
    });
  }

  it("of another length is not taken", async () => {
    const store = new TableStore();
    const lease = store.lease();
    const table = lease.allocate(64);
    lease.release();
    await untilFree(store, 1);
    expect(store.lease().allocate(60)).not.toBe(table);
  });

  it("is not free before all of it is clear", async () => {
    const store = new TableStore();
    const lease = store.lease();
    const table = lease.allocate(40 * MiB);
    lease.release();
    expect(store.freeCount).toBe(0);
    expect(store.lease().allocate(40 * MiB)).not.toBe(table);
    if (libc !== null) await untilFree(store, 1);
  });
});

it("keeps no more than a few jobs' tables", async () => {
  const store = new TableStore();
  const leases = Array.from({ length: 100 }, () => store.lease());
  for (const lease of leases) lease.allocate(8);
  for (const lease of leases) lease.release();
  await untilFree(store, 36);
});

describe.runIf(libc !== null)("dropPages", () => {
  it("zeroes the range and nothing beside it", () => {
    const memory = new SharedArrayBuffer(3 * MiB);
    const bytes = new Uint8Array(memory).fill(0xff);
    const [from, length] = [70_001, 2 * MiB + 12_345];
    expect(libc?.dropPages(memory, from, length)).toBe(0);
    const expected = Buffer.alloc(3 * MiB, 0xff).fill(0, from, from + length);
    expect(Buffer.from(bytes).equals(expected)).toBe(true);
  });

  it("zeroes a range that holds no whole page", () => {
    const memory = new SharedArrayBuffer(4096);
    new Uint8Array(memory).fill(0xff);
    expect(libc?.dropPages(memory, 10, 20)).toBe(0);
    const expected = Buffer.alloc(4096, 0xff).fill(0, 10, 30);
    expect(Buffer.from(memory).equals(expected)).toBe(true);
  });
});
