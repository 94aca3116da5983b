// Clients that do wrong by the thousand are told of, but not by the thousand.
import { expect, it } from "vitest";
import { boundedLog, MAX_WARNINGS, STRETCH_MS } from "../../../../src/nbd/server/bounded-log.js";

it("warnings about clients are bounded in each stretch of time, and their number is told", () => {
  const lines: string[] = [];
  let debugCount = 0;
  let nowMs = 0;
  const log = boundedLog(
    {
      debug: () => debugCount++,
      info: () => undefined,
      warn: (fields: object, message: string) => void lines.push(`${message} ${JSON.stringify(fields)}`),
      error: () => undefined,
    },
    () => nowMs,
  );
  for (let i = 0; i < 1000; i++) log.warn({}, "client broke the protocol");
  expect(lines.length).toBe(MAX_WARNINGS);
  expect(debugCount).toBe(1000 - MAX_WARNINGS);
  nowMs = STRETCH_MS;
  log.warn({}, "again");
  expect(lines.slice(MAX_WARNINGS)).toEqual([
    `warnings about clients were left out {"count":${1000 - MAX_WARNINGS}}`,
    "again {}",
  ]);
});
