// Drives a drainer that shares its thread: with other drainers (workers/copy.ts), or with signals and timers (here.ts).
// One that has a thread for itself blocks it instead. Any thread.

import { setTimeout as delay } from "node:timers/promises";
import type { DrainStep } from "../../cow/drain-io.js";
import { CTL_RUN, RUN_ABORTING } from "../../cow/shared.js";

export interface Driven {
  run(): Generator<DrainStep, void, void>;
}

type WaitStep = Extract<DrainStep, { kind: "wait" }>;

export interface Sharing {
  /** Of the job. */
  control: Int32Array;
  /** After each step: lets others have the thread, if it is their turn. */
  onStep?: () => Promise<void> | undefined;
  /** A word is to change. It may return early: the drainer looks again. */
  onWait: (step: WaitStep) => Promise<void> | undefined;
  /** A job that is aborted is noticed after so long. */
  longestSleepMs: number;
}

/**
 * Several drainers take turns: one goes on while another awaits an answer. No claim is held across such a wait, so a wait
 * for a claim is a wait for another thread. The first failure ends all.
 * @throws what the first that fails throws
 */
export async function driveTogether(drainers: readonly Driven[], sharing: Sharing): Promise<void> {
  const { control } = sharing;
  let failure: { error: unknown } | undefined;
  const isOver = (): boolean => failure !== undefined;
  await Promise.all(
    drainers.map(async (drainer) => {
      try {
        await driveAsync(drainer.run(), sharing, isOver);
      } catch (error) {
        failure ??= { error };
        // Ends the others' waits for a server's answers, here and in other workers, before the main thread knows.
        Atomics.store(control, CTL_RUN, RUN_ABORTING);
        Atomics.notify(control, CTL_RUN);
      }
    }),
  );
  if (failure !== undefined) throw failure.error;
}

/** Until `isOver`: then the drainer is left where it is. */
async function driveAsync(
  steps: Generator<DrainStep, void, void>,
  { control, onStep, onWait, longestSleepMs }: Sharing,
  isOver: () => boolean,
): Promise<void> {
  let result = steps.next();
  while (!result.done) {
    const step = result.value;
    switch (step.kind) {
      case "step": {
        const turn = onStep?.();
        if (turn !== undefined) await turn;
        break;
      }
      case "wait": {
        const wait = onWait(step);
        if (wait !== undefined) await wait;
        break;
      }
      case "sleep": {
        const ms = Number(step.untilNs - process.hrtime.bigint()) / 1e6;
        if (ms > 0 && Atomics.load(control, CTL_RUN) !== RUN_ABORTING) {
          await delay(Math.min(ms, longestSleepMs));
        }
        break;
      }
      case "promise":
        try {
          await step.promise;
        } catch (error) {
          if (isOver()) return;
          result = steps.throw(error);
          continue;
        }
        break;
    }
    if (isOver()) return;
    result = steps.next();
  }
}
