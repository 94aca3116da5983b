// The door to an image's handle: nobody is inside when it is closed, and a commit and a cancel that meet have one winner.
import { describe, expect, it } from "vitest";
import { createDoorMemory, Door, PHASE_CANCELLED, PHASE_COMMITTED } from "../../../src/rbd/door.js";

describe("the door", () => {
  it("is shut when all have left, and for good", () => {
    const memory = createDoorMemory();
    const [keeper, worker] = [new Door(memory), new Door(memory)];
    expect(worker.enter()).toBe(true);
    expect(keeper.shut(0)).toBe(false);
    // Whoever comes now finds it shut, and does not count as inside.
    expect(new Door(memory).enter()).toBe(false);
    worker.leave();
    expect(keeper.shut(0)).toBe(true);
    expect(worker.enter()).toBe(false);
    expect(keeper.shut(0)).toBe(true);
  });

  it.each([
    [PHASE_COMMITTED, PHASE_CANCELLED],
    [PHASE_CANCELLED, PHASE_COMMITTED],
  ] as const)("has one winner of commit and cancel: the first (%i before %i)", (first, second) => {
    const memory = createDoorMemory();
    const [one, other] = [new Door(memory), new Door(memory)];
    expect(one.decide(first)).toBe(true);
    expect(other.decide(second)).toBe(false);
    expect(one.decide(first)).toBe(true);
    expect(other.isCancelled).toBe(first === PHASE_CANCELLED);
  });

  it("keeps the buffers that were left behind until the keeper takes them, and no more than it has room for", () => {
    const memory = createDoorMemory();
    const [keeper, worker] = [new Door(memory), new Door(memory)];
    for (let address = 1n; address <= 2000n; address++) worker.leaveBehind(address);
    const taken = keeper.takeOrphans();
    expect(taken).toHaveLength(1024);
    expect(taken.slice(0, 3)).toEqual([1n, 2n, 3n]);
    expect(keeper.takeOrphans()).toEqual([]);
  });
});
