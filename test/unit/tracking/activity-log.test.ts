import { describe, expect, it } from "vitest";
import {
  LOG_BYTES,
  type LogWrite,
  LogWriter,
  readLog,
  RECORD_BYTES,
} from "../../../src/tracking/activity-log.js";

const GENERATION = "01234567-89ab-4cde-8f01-23456789abcd";
const OTHER = "11234567-89ab-4cde-8f01-23456789abcd";

function apply(file: Uint8Array, writes: readonly LogWrite[]): void {
  for (const { bytes, offsetBytes } of writes) file.set(bytes, offsetBytes);
}

function newLog(): { file: Uint8Array; log: LogWriter } {
  const file = new Uint8Array(LOG_BYTES);
  const log = new LogWriter(GENERATION, 1);
  apply(file, log.base([]));
  return { file, log };
}

describe("the activity log", () => {
  it("holds what was added and not evicted, round after round of the ring", () => {
    const { file, log } = newLog();
    const hot = new Set<number>();
    for (let step = 0; step < 1000; step++) {
      const extent = (step * 7919) % 3000;
      if (log.needsBase()) apply(file, log.base([...hot]));
      if (step % 3 === 2) {
        const [oldest = 0] = hot;
        hot.delete(oldest);
        apply(file, log.record("evict", [oldest]));
      } else {
        hot.add(extent);
        apply(file, log.record("add", [extent]));
      }
      expect(readLog(file, GENERATION)?.hot).toEqual(hot);
    }
  });

  it("keeps a full hot set whose base takes several records, at every stage of it", () => {
    const { file, log } = newLog();
    const all = Array.from({ length: 4096 }, (_, i) => i * 3);
    apply(file, log.record("add", all));
    for (const write of log.base(all)) {
      apply(file, [write]);
      expect(readLog(file, GENERATION)?.hot.size).toBe(4096);
    }
  });

  it("leaves out a record that the power cut, whichever sectors of it are there", () => {
    for (let sectors = 1; sectors < 255; sectors++) {
      const { file, log } = newLog();
      apply(file, log.record("add", [1, 2]));
      const [write] = log.record("add", [3, 4]);
      for (let sector = 0; sector < 8; sector++) {
        if (((sectors >> sector) & 1) === 0 || write === undefined) continue;
        const part = write.bytes.subarray(sector * 512, (sector + 1) * 512);
        file.set(part, write.offsetBytes + sector * 512);
      }
      expect(readLog(file, GENERATION)?.hot).toEqual(new Set([1, 2]));
    }
  });

  it("is worth nothing with any byte of it changed", () => {
    const { file, log } = newLog();
    apply(file, log.record("add", [5]));
    for (let at = RECORD_BYTES; at < 3 * RECORD_BYTES; at += 61) {
      const rotten = file.slice();
      rotten[at] = (rotten[at] ?? 0) ^ 0x10;
      expect(readLog(rotten, GENERATION)).toBeUndefined();
    }
  });

  it("is believed by its own generation only", () => {
    const { file } = newLog();
    expect(readLog(file, OTHER)).toBeUndefined();
    expect(readLog(new Uint8Array(LOG_BYTES), GENERATION)).toBeUndefined();
    expect(readLog(file.subarray(0, LOG_BYTES - 1), GENERATION)).toBeUndefined();
  });
});
