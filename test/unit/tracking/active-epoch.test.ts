import { expect, it } from "vitest";
import { ActiveEpoch } from "../../../src/tracking/active-epoch.js";
import { Bits } from "../../../src/tracking/bits.js";
import type { TrackingFile, TrackingFolder } from "../../../src/tracking/folder.js";

const KiB = 1024;

it("bits that take their time are set where they may be before the file has them, and after", async () => {
  const written: (() => void)[] = [];
  const file = { write: () => new Promise<void>((resolve) => written.push(resolve)) };
  const folder = {
    open: () => Promise.resolve(file as unknown as TrackingFile),
  } as unknown as TrackingFolder;
  const bits = new Bits(1024 * KiB, 64 * KiB);
  const epoch = await ActiveEpoch.open(folder, 1, bits);
  const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));
  let isAllowed = true;
  const set = async (end: () => void): Promise<boolean> => {
    const done = epoch.setSlowly(3, 4, () => isAllowed);
    await turn();
    end();
    await done;
    return bits.hasAll(3, 4);
  };
  isAllowed = false;
  expect(await set(() => expect(written).toEqual([]))).toBe(false);
  isAllowed = true;
  const endWrite = (): void => written.shift()?.();
  expect(
    await set(() => {
      isAllowed = false;
      endWrite();
    }),
  ).toBe(false);
  isAllowed = true;
  expect(await set(endWrite)).toBe(true);
});
