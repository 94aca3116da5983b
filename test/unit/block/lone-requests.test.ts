// When the end of a request is waited for: with a count of events of the test's own.
import { beforeEach, describe, expect, it } from "vitest";
import { LoneRequests } from "../../../src/block/file/lone-requests.js";

const WINDOW = 32;

let events: number;
let lone: LoneRequests;

beforeEach(() => {
  events = 1000;
  lone = new LoneRequests(() => events);
});

/** Requests that are alone, each with so many events of the loop. @returns which are waited for */
function requests(count: number, eventsEach: number): boolean[] {
  return Array.from({ length: count }, () => {
    const waits = lone.next(true);
    events += eventsEach;
    return waits;
  });
}

const all = (value: boolean, count = WINDOW): boolean[] => Array<boolean>(count).fill(value);

describe("requests that are alone", () => {
  it("are waited for when a window of them had no more events than they make", () => {
    expect(requests(WINDOW, 3)).toEqual(all(false));
    expect(requests(3 * WINDOW, 2)).toEqual(all(true, 3 * WINDOW));
  });

  it("are not waited for where the loop has other work", () => {
    expect(requests(4 * WINDOW, 6)).toEqual(all(false, 4 * WINDOW));
    requests(WINDOW, 3);
    // Somebody else has come.
    expect(requests(WINDOW, 6)).toEqual(all(true));
    expect(requests(WINDOW, 6)).toEqual(all(false));
  });

  it("are never waited for where the loop's events are not counted", () => {
    events = NaN;
    expect(requests(4 * WINDOW, 2)).toEqual(all(false, 4 * WINDOW));
  });

  it("are not waited for any more once there are two, until a window has passed", () => {
    requests(2 * WINDOW, 2);
    expect(lone.next(false)).toBe(false);
    expect(requests(WINDOW, 2)).toEqual(all(false));
    expect(requests(1, 2)).toEqual([true]);
  });

  it("are not waited for in some windows after a wait in vain", () => {
    requests(WINDOW, 2);
    expect(requests(1, 2)).toEqual([true]);
    lone.waitedInVain();
    expect(requests(WINDOW - 1, 2)).toEqual(all(false, WINDOW - 1));
    expect(requests(8 * WINDOW, 2)).toEqual(all(false, 8 * WINDOW));
    expect(requests(WINDOW, 2)).toEqual(all(true));
  });
});
