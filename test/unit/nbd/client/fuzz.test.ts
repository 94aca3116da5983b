// A few seconds of the fuzzer of the NBD client; `npm run fuzz` runs it for longer.
import { expect, test } from "vitest";
import { fuzzNbdClient } from "../../../fuzz/nbd-client-stream.js";

test("no server harms the client, its memory or the data that it hands on", async () => {
  const seed = 20_260_101;
  const { cases, findings, notes } = await fuzzNbdClient({ seed, iterations: 90, seconds: 5 });
  expect(findings).toEqual([]);
  expect(cases).toBeGreaterThan(0);
  // The oracle has something to say only if intact conversations are among the cases.
  expect(Number(/^\d+/.exec(notes[0] ?? "")?.[0])).toBeGreaterThan(0);
});
