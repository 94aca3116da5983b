/** Bytes a second over the last seconds, from samples of a growing count. */
export class RateMeter {
  readonly #samples: { ms: number; bytes: number }[] = [];

  /** Time over which the rate is averaged. */
  static readonly WINDOW_MS = 5_000;
  static readonly MIN_INTERVAL_MS = 100;

  sample(nowMs: number, bytes: number): number {
    const samples = this.#samples;
    const newest = samples.at(-1);
    if (newest === undefined || nowMs - newest.ms >= RateMeter.MIN_INTERVAL_MS)
      samples.push({ ms: nowMs, bytes });
    while (samples.length > 2 && nowMs - (samples[0]?.ms ?? 0) > RateMeter.WINDOW_MS) samples.shift();
    const oldest = samples[0];
    if (oldest === undefined || nowMs <= oldest.ms) return 0;
    return ((bytes - oldest.bytes) * 1000) / (nowMs - oldest.ms);
  }
}
