// When the end of a request is waited for: with a clock of the test's own.
import { beforeEach, describe, expect, it } from "vitest";
import { LoneRequests } from "../../../src/block/file/lone-requests.js";

const WINDOW = 32;

let nowMs: number;
let activeMs: number;
let lone: LoneRequests;

beforeEach(() => {
  nowMs = 1000;
  activeMs = 500;
  lone = new LoneRequests({ nowMs: () => nowMs, activeMs: () => activeMs });
});

/** Requests that are alone, of which each takes a millisecond, `busyMs` of it the loop's work. @returns which waited */
function requests(count: number, busyMs: number, forMs = 0.5, inVain = false): boolean[] {
  return Array.from({ length: count }, () => {
    const waits = lone.next(true);
    nowMs += 1;
    activeMs += busyMs;
    if (waits) {
      activeMs += forMs;
      lone.waited(forMs, inVain);
    }
    return waits;
  });
}

const all = (value: boolean, count = WINDOW): boolean[] => Array<boolean>(count).fill(value);

describe("requests that are alone", () => {
  it("are waited for when a window of them has left the loop idle", () => {
    expect(requests(WINDOW, 0.3)).toEqual(all(false));
    expect(requests(3 * WINDOW, 0.3)).toEqual(all(true, 3 * WINDOW));
  });

  it("are not waited for where the loop has other work, whatever it was held up here", () => {
    expect(requests(4 * WINDOW, 0.7)).toEqual(all(false, 4 * WINDOW));
    requests(WINDOW, 0.3);
    expect(requests(WINDOW, 0.3)).toEqual(all(true));
    // Somebody else has come.
    expect(requests(WINDOW, 0.7, 0.1)).toEqual(all(true));
    expect(requests(WINDOW, 0.7)).toEqual(all(false));
  });

  it("are not waited for any more once there are two, until a window has passed", () => {
    requests(2 * WINDOW, 0.1);
    expect(lone.next(false)).toBe(false);
    expect(requests(WINDOW, 0.1)).toEqual(all(false));
    expect(requests(1, 0.1)).toEqual([true]);
  });

  it("are not waited for in some windows after a wait in vain", () => {
    requests(WINDOW, 0.1);
    expect(requests(1, 0.1, 0.5, true)).toEqual([true]);
    expect(requests(WINDOW - 1, 0.1)).toEqual(all(false, WINDOW - 1));
    expect(requests(8 * WINDOW, 0.1)).toEqual(all(false, 8 * WINDOW));
    expect(requests(WINDOW, 0.1)).toEqual(all(true));
  });
});
