import { expect, it } from "vitest";
import { Bits } from "../../../src/tracking/bits.js";
import { EpochStore } from "../../../src/tracking/epoch-store.js";
import type { TrackingFolder } from "../../../src/tracking/folder.js";

const GRANULE_BYTES = 512;

function bitsOf(...granules: number[]): Bits {
  const bits = new Bits(64 * GRANULE_BYTES, GRANULE_BYTES);
  for (const granule of granules) bits.set(granule, granule);
  return bits;
}

it("keeps epochs apart that a checkpoint lies between, though a restart skipped the number that it names", async () => {
  const files = new Map<string, Uint8Array>();
  const folder = {
    name: "tracking",
    read: (name: string) => Promise.resolve(files.get(name) ?? null),
    replace: (name: string, bytes: Uint8Array) => Promise.resolve(void files.set(name, bytes)),
    remove: (name: string) => Promise.resolve(void files.delete(name)),
  } as unknown as TrackingFolder;
  const list = { generation: crypto.randomUUID(), epochs: [], checkpoints: [], loss: null };
  const store = new EpochStore(folder, list, GRANULE_BYTES);
  const changed = async (epoch: number): Promise<number[]> => {
    const bits = bitsOf();
    await store.collect(epoch, bits);
    return Array.from({ length: bits.granuleCount }, (_, granule) => granule).filter((n) => bits.has(n));
  };
  const name = async (text: string, epoch: number): Promise<void> => {
    const to = { name: text, uuid: crypto.randomUUID(), epoch, createdMs: 0 };
    const made = await store.change([{ name: text, to }]);
    await made.done();
  };
  await name("weekly", 1);
  await store.add(1, bitsOf(3));
  await name("daily", 2);
  // A server that starts again goes on with the bits of epoch 2 under number 3.
  await store.add(3, bitsOf(9));
  expect([await changed(1), await changed(2)]).toEqual([[3, 9], [9]]);
  // Without the name between them one file is enough, and nothing is lost by it.
  await store.delete("daily");
  expect(await changed(1)).toEqual([3, 9]);
  expect([...files.keys()].sort()).toEqual(["checkpoints.json", "epoch-1.bits"]);
});
