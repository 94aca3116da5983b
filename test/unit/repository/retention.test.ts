// Worked out by hand from PBS's description of its rules ("Maintenance: Pruning"), a table a case.
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { decideRetention, periodOf, type Retention } from "../../../src/repository/upkeep/retention.js";

const zone = process.env["TZ"];
beforeEach(() => void (process.env["TZ"] = "UTC"));
afterEach(() => {
  if (zone === undefined) delete process.env["TZ"];
  else process.env["TZ"] = zone;
});

const at = (short: string): string => `${short}:00.000000000Z`;

function kept(times: readonly string[], retention: Retention, isProtected: readonly string[] = []): string[] {
  const backups = times.map((time) => ({ time: at(time), isProtected: isProtected.includes(time) }));
  return decideRetention(backups, retention)
    .filter(({ keep }) => keep)
    .map(({ time }) => time.slice(0, 16));
}

describe("retention, by PBS's rules", () => {
  it("keeps the last N", () => {
    const times = ["2026-01-01T10:00", "2026-01-01T11:00", "2026-01-02T10:00"];
    expect(kept(times, { last: 2 })).toEqual(["2026-01-01T11:00", "2026-01-02T10:00"]);
    expect(kept(times, { last: 9 })).toEqual(times);
  });

  it("keeps the newest of each day, for as many days as have a backup", () => {
    const times = [
      "2026-01-01T01:00",
      "2026-01-01T23:00",
      "2026-01-03T01:00",
      "2026-01-07T05:00",
      "2026-01-07T06:00",
    ];
    expect(kept(times, { daily: 2 })).toEqual(["2026-01-03T01:00", "2026-01-07T06:00"]);
    expect(kept(times, { daily: 3 })).toEqual(["2026-01-01T23:00", "2026-01-03T01:00", "2026-01-07T06:00"]);
  });

  it("a period that an earlier rule has provided for is passed over and does not count", () => {
    const times = ["2026-01-01T12:00", "2026-01-02T12:00", "2026-01-03T12:00", "2026-01-03T13:00"];
    // last 1: the 3rd, 13:00. daily 2: the 3rd is provided for, so the 2nd and the 1st.
    expect(kept(times, { last: 1, daily: 2 })).toEqual([
      "2026-01-01T12:00",
      "2026-01-02T12:00",
      "2026-01-03T13:00",
    ]);
  });

  it("what one rule has decided to let go no later rule brings back", () => {
    const times = ["2026-01-03T12:00", "2026-01-03T13:00", "2026-02-01T00:00"];
    // daily 2: the 1st of February, and of the 3rd of January 13:00; 12:00 is let go. monthly 5: both months provided for.
    expect(kept(times, { daily: 2, monthly: 5 })).toEqual(["2026-01-03T13:00", "2026-02-01T00:00"]);
  });

  it("PBS's own example: a year of rules over daily backups", () => {
    const times: string[] = [];
    for (let day = 0; day < 400; day++) {
      times.push(new Date(Date.UTC(2025, 0, 1 + day, 22)).toISOString().slice(0, 16));
    }
    const result = kept(times, { last: 3, daily: 13, weekly: 8, monthly: 11, yearly: 9 });
    // Newest: 2026-02-04, a Wednesday. last: Feb 4, 3, 2. daily: Feb 1 to Jan 20. weekly: from Jan 18 eight Sundays, the
    // week of Jan 19 being provided for; monthly: January and February 2026, December are provided for (Dec 28 is the last Sunday
    // kept of December), so Nov 30 (already weekly: provided) and then Oct 31 to Jan 31 of 2025, as far as they go.
    expect(result.slice(-16)).toEqual(times.slice(-16));
    expect(
      result.filter((time) => time.startsWith("2026-01-18") || time.startsWith("2025-11-30")),
    ).toHaveLength(2);
    expect(result).toContain("2025-10-31T22:00");
    expect(result).toContain("2025-01-31T22:00");
    expect(result).not.toContain("2025-01-30T22:00");
    expect(result).toHaveLength(3 + 13 + 8 + 10);
  });

  it("protected ones stay and count for no rule", () => {
    const times = ["2026-01-01T12:00", "2026-01-02T12:00", "2026-01-03T12:00"];
    expect(kept(times, { last: 1 }, ["2026-01-03T12:00"])).toEqual(["2026-01-02T12:00", "2026-01-03T12:00"]);
  });

  it("says of each what keeps it, or that nothing does", () => {
    const backups = ["2026-01-01T12:00", "2026-01-02T12:00", "2026-01-02T13:00"].map((time) => ({
      time: at(time),
      isProtected: false,
    }));
    expect(decideRetention(backups, { daily: 1 }).map(({ reason }) => reason)).toEqual([
      "no rule keeps it",
      "a later one of daily 2026-01-02 is kept",
      "keep-daily 2026-01-02",
    ]);
  });

  it("refuses to forget everything for want of a rule", () => {
    expect(() => decideRetention([], {})).toThrow(/no rule/);
    expect(() => decideRetention([], { last: 0, daily: 0 })).toThrow(/no rule/);
  });
});

describe("the calendar is the local one", () => {
  it("weeks are ISO's: 1 January 2027 is in week 53 of 2026", () => {
    expect(periodOf("weekly", at("2027-01-01T12:00"))).toBe("2026-W53");
    expect(periodOf("weekly", at("2026-01-01T12:00"))).toBe("2026-W01");
    expect(periodOf("weekly", at("2025-12-29T12:00"))).toBe("2026-W01");
    expect(periodOf("weekly", at("2025-12-28T12:00"))).toBe("2025-W52");
  });

  it("a day begins at local midnight", () => {
    process.env["TZ"] = "Europe/Berlin";
    expect(periodOf("daily", at("2026-06-30T22:30"))).toBe("2026-07-01");
    expect(periodOf("monthly", at("2026-06-30T22:30"))).toBe("2026-07");
    process.env["TZ"] = "America/Los_Angeles";
    expect(periodOf("daily", at("2026-07-01T06:30"))).toBe("2026-06-30");
  });

  it("the hour that comes twice when summer time ends is one hour", () => {
    process.env["TZ"] = "Europe/Berlin";
    // 25 October 2026: 03:00 CEST becomes 02:00 CET at 01:00 UTC.
    const times = ["2026-10-25T00:30", "2026-10-25T01:30", "2026-10-25T02:30"];
    expect(times.map((time) => periodOf("hourly", at(time)))).toEqual([
      "2026-10-25 02h",
      "2026-10-25 02h",
      "2026-10-25 03h",
    ]);
    expect(kept(times, { hourly: 5 })).toEqual(["2026-10-25T01:30", "2026-10-25T02:30"]);
  });

  it("the hour that is left out when summer time begins is no hour", () => {
    process.env["TZ"] = "Europe/Berlin";
    // 29 March 2026: 02:00 CET becomes 03:00 CEST at 01:00 UTC.
    expect(periodOf("hourly", at("2026-03-29T00:59"))).toBe("2026-03-29 01h");
    expect(periodOf("hourly", at("2026-03-29T01:00"))).toBe("2026-03-29 03h");
  });
});
