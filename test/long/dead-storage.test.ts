// The whole matrix of test/integration/backup/dead-storage.test.ts: the storage dies at each call that a backup makes to
// its target's side, one after another, in each of several lives. Of calls that are made for each chunk some are taken.
import { afterAll, expect, it } from "vitest";
import { DeadStorage, type DeathAt, type Scenario, survive } from "../support/dead-storage.js";
import { stopAll } from "../support/server.js";

afterAll(stopAll);

const AT_ONCE = 3;
/** Of one name's calls: the first so many, and some of the others. */
const FIRST = 8;
const LATER = 4;

const LIVES: Scenario[] = [
  {
    name: "everything",
    args: ["--verify", "--direct"],
    serveArgs: ["--snapshot-export"],
    replaces: true,
    spills: true,
  },
  { name: "a new target", args: ["-c", "zlib"] },
  { name: "cancelled", args: [], spills: true, cancels: true },
  { name: "without a buffer", args: ["--cow-buffer-size", "0"] },
];

it.each(LIVES)("the storage of a backup that is $name dies at each of its calls", async (scenario) => {
  const deaths = chosen(await countsOf(scenario));
  const failures: string[] = [];
  let longestMs = 0;
  const next = async (): Promise<void> => {
    for (let death = deaths.pop(); death !== undefined; death = deaths.pop()) {
      const { call, nth } = death;
      try {
        const { diskWaitMs, otherWaitMs } = await survive(scenario, death);
        longestMs = Math.max(longestMs, otherWaitMs);
        console.log(`${call} ${nth}: guests waited ${diskWaitMs} and ${otherWaitMs} ms at most`);
      } catch (error) {
        // How many calls there are differs a little from run to run.
        if (String(error).includes("there was no")) continue;
        failures.push(`${call} ${nth}: ${String(error)}`);
      }
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, next));
  console.log(`longest wait of the guest whose disk is not backed up: ${longestMs} ms`);
  expect(failures).toEqual([]);
});

async function countsOf(scenario: Scenario): Promise<Map<string, number>> {
  const storage = await DeadStorage.start(scenario);
  const { disk, other } = await storage.guests();
  await storage.play(storage.backup(), disk);
  await Promise.all([disk.quit(), other.quit()]);
  await storage.server.stop();
  const counts = new Map<string, number>();
  for (const { call } of storage.calls()) counts.set(call, (counts.get(call) ?? 0) + 1);
  return counts;
}

function chosen(counts: ReadonlyMap<string, number>): DeathAt[] {
  return [...counts].flatMap(([call, count]) => {
    const places = Array.from({ length: Math.min(count, FIRST) }, (_, nth) => nth);
    for (let i = 1; i <= LATER; i++) places.push(Math.floor(FIRST + ((count - FIRST) * i) / (LATER + 1)));
    return [...new Set(places)].filter((nth) => nth < count).map((nth) => ({ call, nth }));
  });
}
