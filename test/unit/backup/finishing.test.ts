// The end of a backup whose target's last step may hang: a cancel that comes then ends it all the same.
import { describe, expect, it } from "vitest";
import { Finishing } from "../../../src/backup/job/finishing.js";
import { JOB_DEFAULTS, type JobOptions } from "../../../src/backup/options.js";
import { geometryOf } from "../../../src/cow/geometry.js";
import { createSharedState } from "../../../src/cow/shared.js";
import { CowcatcherError } from "../../../src/errors.js";
import type { Target } from "../../../src/target/target.js";

const JOB: JobOptions = { ...JOB_DEFAULTS, target: "t", targetFormat: "raw" };
const CANCELLED = new CowcatcherError({
  code: "CANCELLED",
  object: "t",
  problem: "the backup was cancelled",
});

/** A target whose commit ends when the test says so. */
function hangingTarget(commitMayHang: boolean): { target: Target; hangs: Promise<void>; end: () => void } {
  let end = (): void => undefined;
  let noteHang = (): void => undefined;
  const hangs = new Promise<void>((resolve) => {
    noteHang = resolve;
  });
  const target: Target = {
    name: "t",
    granularityBytes: 1,
    description: { format: "null", name: "t" },
    commitMayHang,
    unfinishedPath: null,
    complete: () => Promise.resolve(),
    commit: () =>
      new Promise((resolve) => {
        end = resolve;
        noteHang();
      }),
    finish: () => Promise.resolve(),
    abort: () => Promise.resolve(),
    abortSync: () => undefined,
  };
  return { target, hangs, end: () => end() };
}

function finishingOf(target: Target): Finishing {
  const shared = createSharedState(geometryOf(1024 * 1024), new SharedArrayBuffer(0), 0, false);
  return new Finishing(target, JOB, shared);
}

describe("a cancel while the target gets its name", () => {
  it("ends the wait where that may hang", async () => {
    const { target, hangs } = hangingTarget(true);
    const finishing = finishingOf(target);
    const run = finishing.run();
    await hangs;
    expect(finishing.cancel(CANCELLED)).toBe(true);
    await expect(run).rejects.toBe(CANCELLED);
  });

  it("is too late once it has it", async () => {
    const { target, hangs, end } = hangingTarget(true);
    const finishing = finishingOf(target);
    const run = finishing.run();
    await hangs;
    end();
    await run;
    expect(finishing.cancel(CANCELLED)).toBe(false);
  });

  it("is decided by the target where that waits for others", async () => {
    for (const isInTime of [true, false]) {
      const { target, hangs, end } = hangingTarget(false);
      let refuse = (_error: Error): void => undefined;
      const refused = new Promise<never>((_resolve, reject) => (refuse = reject));
      const commit = (): Promise<void> => target.commit();
      let abortCount = 0;
      const finishing = finishingOf({
        ...target,
        commitWaits: true,
        commit: () => Promise.race([commit(), refused]),
        abort() {
          abortCount++;
          return Promise.resolve();
        },
      });
      const run = finishing.run();
      await hangs;
      expect(finishing.cancel(CANCELLED)).toBe(false);
      expect(abortCount).toBe(1);
      if (isInTime) {
        refuse(new Error("given up"));
        await expect(run).rejects.toBe(CANCELLED);
      } else {
        end();
        await run;
      }
    }
  });

  it("is too late from the beginning on where it takes no time", async () => {
    const { target, hangs, end } = hangingTarget(false);
    const finishing = finishingOf(target);
    const run = finishing.run();
    await hangs;
    expect(finishing.cancel(CANCELLED)).toBe(false);
    end();
    await run;
  });
});
