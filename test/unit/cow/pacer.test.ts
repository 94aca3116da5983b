import { describe, expect, it } from "vitest";
import { geometryOf } from "../../../src/cow/geometry.js";
import { Pacer } from "../../../src/cow/pacer.js";
import { createSharedState, CTL_USED_BLOCKS, type SharedState } from "../../../src/cow/shared.js";

const BUFFER = 4 * 1024 * 1024;
const BLOCKS = BUFFER / 4096;

function make(): { shared: SharedState; pacer: Pacer; use: (blocks: number) => void } {
  const shared = createSharedState(geometryOf(BUFFER), new SharedArrayBuffer(BUFFER), BUFFER);
  const pacer = new Pacer(shared);
  return { shared, pacer, use: (blocks) => Atomics.store(shared.control, CTL_USED_BLOCKS, blocks) };
}

/** A guest that captures as fast as it may, 16 blocks at a time, for `ms`; blocks captured. */
function runGuest(
  fromMs: number,
  ms: number,
  freedPerMs: number,
  used: number,
): { captured: number; used: number } {
  const { pacer, use } = make();
  let captured = 0;
  let level = used;
  let freed = 0;
  pacer.admitted(used);
  for (let now = fromMs; now < fromMs + ms; now++) {
    freed += freedPerMs;
    const whole = Math.min(level, Math.floor(freed));
    freed -= whole;
    level -= whole;
    use(level);
    while (level + 16 <= BLOCKS && pacer.delayMs(now) <= 0) {
      level += 16;
      captured += 16;
      use(level);
      pacer.admitted(16);
    }
  }
  return { captured, used: level };
}

describe("Pacer", () => {
  it("holds nothing up below 75 %", () => {
    const { pacer, use } = make();
    use(BLOCKS * 0.74);
    for (let now = 0; now < 100; now++) {
      expect(pacer.delayMs(now)).toBe(0);
      pacer.admitted(16);
    }
  });

  it("brings the guest down to the rate at which blocks come free", () => {
    const { captured, used } = runGuest(0, 20_000, 2, BLOCKS * 0.75);
    expect(captured).toBeGreaterThan(2 * 20_000 * 0.9);
    expect(captured).toBeLessThan(2 * 20_000 + BLOCKS / 4 + 16);
    expect(used).toBeGreaterThan(BLOCKS * 0.7);
  });

  it("lets a capture through every 100 ms at least when the target stands still but there is room", () => {
    const { pacer, use } = make();
    let used = BLOCKS * 0.76;
    pacer.admitted(used);
    // The target did something once, then nothing for half a minute.
    use(used);
    pacer.delayMs(1000);
    used -= 1;
    use(used);
    for (let now = 1000; now < 31_000; now += 10) pacer.delayMs(now);
    let admitted = 0;
    for (let now = 31_000; now < 32_000; now++) {
      if (pacer.delayMs(now) > 0) continue;
      admitted++;
      used += 1;
      use(used);
      pacer.admitted(1);
    }
    expect(admitted).toBeGreaterThanOrEqual(9);
  });

  it("holds nothing up after the level has fallen again", () => {
    const { pacer, use } = make();
    pacer.admitted(BLOCKS);
    use(BLOCKS);
    pacer.delayMs(100);
    use(BLOCKS - 1);
    pacer.delayMs(200);
    pacer.admitted(256);
    use(BLOCKS * 0.5);
    expect(pacer.delayMs(201)).toBe(0);
    use(BLOCKS * 0.8);
    expect(pacer.delayMs(202)).toBeLessThanOrEqual(0);
  });
});
