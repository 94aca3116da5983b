// A few seconds of the fuzzer of the NBD server's byte stream; `npm run fuzz` runs it for longer.
import { expect, test } from "vitest";
import { fuzzNbdServer } from "../../../fuzz/nbd-stream.js";

test("no byte stream harms the server, its memory or its other clients", async () => {
  const seed = 20_260_101;
  const { cases, findings, notes } = await fuzzNbdServer({ seed, iterations: 300, seconds: 8 });
  expect(findings).toEqual([]);
  expect(cases).toBeGreaterThan(20);
  // The oracle has something to say only if intact conversations are among the cases.
  expect(Number(/^\d+/.exec(notes[0] ?? "")?.[0])).toBeGreaterThan(10);
});
