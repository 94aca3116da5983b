import { join } from "node:path";
import { afterEach, beforeEach, expect, it } from "vitest";
import { TargetClaims } from "../../../src/backup/guard/target-claims.js";
import type { BackupRequest } from "../../../src/backup/host.js";
import { JOB_DEFAULTS } from "../../../src/backup/options.js";
import { scratchFolder, stopAll } from "../../support/server.js";
import { LocalHands } from "../../support/storage-hands.js";

const NOTHING = { images: [], listeners: [] };
let claims: TargetClaims;
let target: string;

beforeEach(() => {
  claims = new TargetClaims(new LocalHands());
  target = join(scratchFolder(), "target.raw");
});
afterEach(stopAll);

function request(id: string): BackupRequest {
  return { id, disk: "disk", options: { ...JOB_DEFAULTS, target, targetFormat: "raw" } };
}

it("of a job that runs is refused at once, and free when that has released it", async () => {
  const first = await claims.claim(request("a"), NOTHING);
  await expect(claims.claim(request("b"), NOTHING)).rejects.toMatchObject({
    code: "BUSY",
    problem: "the job a writes there",
  });
  await first.release();
  await (await claims.claim(request("b"), NOTHING)).release();
});

it("of a job that is over is waited for until it is undone, whatever the next one's id", async () => {
  const first = await claims.claim(request("a"), NOTHING);
  first.giveUp();
  let isTaken = false;
  const second = claims.claim(request("a"), NOTHING).then((claim) => {
    isTaken = true;
    return claim;
  });
  for (let i = 0; i < 20; i++) await new Promise((turn) => setImmediate(turn));
  expect(isTaken).toBe(false);
  await first.release();
  await (await second).release();
});

it("of a job that is over, with storage that hangs, is refused after a while", async () => {
  const first = await claims.claim(request("a"), NOTHING);
  first.giveUp();
  await expect(claims.claim(request("b"), NOTHING)).rejects.toMatchObject({ code: "BUSY" });
  await first.release();
});
