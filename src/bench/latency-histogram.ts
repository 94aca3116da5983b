// Latencies by the thousand a second, in memory that is taken once: buckets of equal width within each power of two
// (as in HdrHistogram), so that any percentile is exact to less than one part in 128, from 1 µs to 35 minutes.
//
//   µs       0 … 255    256 … 511    512 … 1023   …
//   width    1          2            4            …

/** Of the value of a bucket, the bits that count: 2^7 buckets in each power of two. */
const PRECISION_BITS = 7;
const BUCKETS_PER_POWER = 2 ** PRECISION_BITS;
const EXACT_BELOW = 2 * BUCKETS_PER_POWER;
const MAX_VALUE = 2 ** 31 - 1;
const BUCKET_COUNT = bucketOf(MAX_VALUE) + 1;

export class LatencyHistogram {
  readonly #counts = new Float64Array(BUCKET_COUNT);
  #count = 0;
  #sumMicroseconds = 0;
  #longestMicroseconds = 0;

  /** Values beyond 35 minutes count as that long. */
  record(microseconds: number): void {
    const value = Math.min(Math.max(Math.round(microseconds), 0), MAX_VALUE);
    const bucket = bucketOf(value);
    this.#counts[bucket] = (this.#counts[bucket] ?? 0) + 1;
    this.#count++;
    this.#sumMicroseconds += microseconds;
    if (microseconds > this.#longestMicroseconds) this.#longestMicroseconds = microseconds;
  }

  get count(): number {
    return this.#count;
  }

  /** NaN without a value, as the other figures are. */
  get averageMicroseconds(): number {
    return this.#sumMicroseconds / this.#count;
  }

  get longestMicroseconds(): number {
    return this.#count === 0 ? NaN : this.#longestMicroseconds;
  }

  /**
   * The least value that `fraction` of all values do not exceed, rounded up to its bucket's last microsecond.
   * @param fraction above 0, at most 1.
   */
  percentileMicroseconds(fraction: number): number {
    if (this.#count === 0) return NaN;
    const wanted = Math.ceil(this.#count * fraction);
    let seen = 0;
    for (let bucket = 0; bucket < BUCKET_COUNT; bucket++) {
      seen += this.#counts[bucket] ?? 0;
      if (seen >= wanted) return Math.min(lastOf(bucket), this.#longestMicroseconds);
    }
    return this.#longestMicroseconds;
  }
}

function bucketOf(value: number): number {
  if (value < EXACT_BELOW) return value;
  const shift = 31 - Math.clz32(value) - PRECISION_BITS;
  return shift * BUCKETS_PER_POWER + (value >>> shift);
}

/** The greatest value that falls into a bucket: bucketOf's inverse. */
function lastOf(bucket: number): number {
  if (bucket < EXACT_BELOW) return bucket;
  const shift = Math.floor(bucket / BUCKETS_PER_POWER) - 1;
  return (bucket - shift * BUCKETS_PER_POWER + 1) * 2 ** shift - 1;
}
