import { expect, it } from "vitest";
import type { TrackingFile } from "../../../src/tracking/folder.js";
import { decodePulse, PULSE_BYTES, PulseKeeper } from "../../../src/tracking/pulse.js";

it("says writing before a write is issued, and quiet with the image's looks only when nothing was written", async () => {
  const record = new Uint8Array(PULSE_BYTES);
  const writeNow = (bytes: Uint8Array): void => record.set(bytes);
  const write = (bytes: Uint8Array): Promise<void> => Promise.resolve(writeNow(bytes));
  const looks = { changedNs: 7n, files: "ab".repeat(32) };
  const keeper = new PulseKeeper(
    {
      file: { write, writeNow } as unknown as TrackingFile,
      generation: crypto.randomUUID(),
      looks: () => Promise.resolve(looks),
      isLocal: true,
      logger: { warn: () => undefined },
    },
    undefined,
  );
  const isWriting = (): boolean | undefined => decodePulse(record)?.writing;
  keeper.touch();
  await keeper.beat();
  expect(isWriting()).toBe(true);
  await keeper.beat();
  expect(decodePulse(record)).toMatchObject({ writing: false, ...looks });
  // In the turn of the write itself.
  keeper.touch();
  expect(isWriting()).toBe(true);
  // One that comes while the image is looked at is not overlooked.
  await keeper.beat();
  const looking = keeper.beat();
  keeper.touch();
  await looking;
  expect(isWriting()).toBe(true);
});
