import { describe, expect, it } from "vitest";
import { GuestStreams } from "../../../src/cow/guest-streams.js";

const KiB = 1024;

describe("GuestStreams", () => {
  it("takes nothing along with writes at random places, be they next to an older one", () => {
    const streams = new GuestStreams();
    for (const offset of [0, 512 * KiB, 1024 * KiB, 508 * KiB]) {
      expect(streams.note(offset, 4 * KiB)).toBe(offset + 4 * KiB);
    }
  });

  it("takes the rest of 64 KiB along with a write that goes on, for each of several streams", () => {
    const streams = new GuestStreams();
    streams.note(0, 4 * KiB);
    streams.note(1024 * KiB, 16 * KiB);
    expect(streams.note(4 * KiB, 4 * KiB)).toBe(64 * KiB);
    expect(streams.note(1040 * KiB, 48 * KiB)).toBe(1088 * KiB);
    expect(streams.note(8 * KiB, 60 * KiB)).toBe(128 * KiB);
  });

  it("forgets the stream that is the oldest of more than sixteen", () => {
    const streams = new GuestStreams();
    for (let i = 0; i <= 16; i++) streams.note(i * 1024 * KiB, 4 * KiB);
    expect(streams.note(4 * KiB, 4 * KiB)).toBe(8 * KiB);
    expect(streams.note(1028 * KiB + 15 * 1024 * KiB, 4 * KiB)).toBe(16 * 1024 * KiB + 64 * KiB);
  });
});
