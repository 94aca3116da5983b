import { describe, expect, it } from "vitest";
import { LatencyHistogram } from "../../../src/bench/latency-histogram.js";
import { Random } from "../../support/random.js";

function histogramOf(values: readonly number[]): LatencyHistogram {
  const histogram = new LatencyHistogram();
  for (const value of values) histogram.record(value);
  return histogram;
}

describe("LatencyHistogram", () => {
  it("has no figures without a value", () => {
    const histogram = new LatencyHistogram();
    expect(histogram.count).toBe(0);
    expect(histogram.averageMicroseconds).toBeNaN();
    expect(histogram.longestMicroseconds).toBeNaN();
    expect(histogram.percentileMicroseconds(0.99)).toBeNaN();
  });

  it("is exact for one value, at the bounds of its buckets too", () => {
    for (const value of [0, 1, 127, 128, 255, 256, 257, 511, 512, 65_535, 65_536, 2 ** 31 - 1]) {
      const histogram = histogramOf([value]);
      expect(histogram.percentileMicroseconds(1)).toBe(value);
      expect(histogram.percentileMicroseconds(0.001)).toBe(value);
      expect(histogram.longestMicroseconds).toBe(value);
      expect(histogram.averageMicroseconds).toBe(value);
    }
  });

  it("is less than one part in 128 above the true percentile, never below it", () => {
    const random = new Random(7);
    const values = Array.from({ length: 20_000 }, () => Math.floor(2 ** (random.below(2500) / 100)));
    const sorted = [...values].sort((a, b) => a - b);
    const histogram = histogramOf(values);
    for (const fraction of [0.001, 0.1, 0.5, 0.9, 0.99, 0.999, 1]) {
      const exact = sorted[Math.ceil(sorted.length * fraction) - 1] ?? NaN;
      const shown = histogram.percentileMicroseconds(fraction);
      expect(shown).toBeGreaterThanOrEqual(exact);
      expect(shown).toBeLessThanOrEqual(exact * (1 + 1 / 128));
    }
    expect(histogram.count).toBe(20_000);
    expect(histogram.longestMicroseconds).toBe(sorted.at(-1));
  });

  it("counts the 99th percentile from below", () => {
    const histogram = histogramOf([...Array<number>(99).fill(10), 5000]);
    expect(histogram.percentileMicroseconds(0.99)).toBe(10);
    expect(histogram.percentileMicroseconds(0.991)).toBe(5000);
  });

  it("takes what is longer than its last bucket for that long, and still shows the longest", () => {
    const histogram = histogramOf([2 ** 40]);
    expect(histogram.percentileMicroseconds(0.5)).toBe(2 ** 31 - 1);
    expect(histogram.longestMicroseconds).toBe(2 ** 40);
  });
});
