// Tables that fit 80 columns, colours, and the picture of a guest's writes.
import { describe, expect, it } from "vitest";
import type { PhaseResult } from "../../../src/bench/benchmark.js";
import { Timeline, type TimelineFigures } from "../../../src/bench/timeline.js";
import { summaryTable } from "../../../src/cli/actions/run-table.js";
import { fitColumns } from "../../../src/cli/output/columns.js";
import { coloured, hasColours } from "../../../src/cli/output/colour.js";
import { timelinePictures } from "../../../src/cli/output/timeline-picture.js";
import type { JobResult } from "../../../src/run/result.js";

describe("tables", () => {
  it("cut the first cells, and no others, to fit", () => {
    const rows = [
      ["NAME", "SIZE"],
      ["a".repeat(30), "123456"],
      ["b", "1"],
    ];
    expect(fitColumns(rows, 20)).toEqual(["NAME          SIZE", "aaaaaaaaaaa…  123456", "b             1"]);
    expect(fitColumns(rows, 100)[1]).toBe(`${"a".repeat(30)}  123456`);
  });

  it("of a run fit 80 columns, whatever is in them", () => {
    const disk = {
      ...{ disk: "d", target: "t", t0: null, bytes: 1, bytes_written: 100 * 2 ** 40, bytes_on_target: 1 },
      ...{ captured_bytes: 0, spilled_bytes: 0, guest_waits: 1, guest_wait_ms_max: 59_900 },
      ...{ guest_wait_ms_total: 1, ignored_errors: 0 },
    };
    const result: JobResult = {
      ...{ job: "j".repeat(100), group: "g", result: "failed", exit_code: 143, started: "", ended: "" },
      ...{ seconds: 86_400 * 4, level: "incremental", level_reason: "", tries: 1, verified: false },
      ...{ disks: [disk], removed: new Array<string>(1000).fill(""), warnings: [], error: null },
    };
    const lines = summaryTable([result]);
    expect(Math.max(...lines.map(({ length }) => length))).toBeLessThanOrEqual(80);
    expect(lines[1]).toMatch(/^j+…  failed \(143\)  incremental  100 TiB  96:00:00  59\.9 s  1000$/);
  });
});

describe("colours", () => {
  const terminal = { isTTY: true, write: () => true };
  it("are on terminals alone, and not with NO_COLOR", () => {
    expect(hasColours(terminal, {})).toBe(true);
    expect(hasColours(terminal, { NO_COLOR: "" })).toBe(true);
    expect(hasColours(terminal, { NO_COLOR: "1" })).toBe(false);
    expect(hasColours(terminal, { TERM: "dumb" })).toBe(false);
    expect(hasColours({ write: () => true }, {})).toBe(false);
    expect(coloured("x", "red", true)).toBe("\u001b[31mx\u001b[0m");
    expect(coloured("x", "red", false)).toBe("x");
  });
});

describe("the picture of a guest's writes", () => {
  /** A guest that writes a thousand a second, and during the backup a hundred. */
  function timeline(): TimelineFigures {
    const line = new Timeline(0);
    for (let ms = 0; ms < 10_000; ms++) {
      const isSlow = ms >= 2000 && ms < 8000;
      if (!isSlow || ms % 10 === 0) line.record(ms);
    }
    line.markT0(2000);
    line.markEnd(8000);
    return line.figures(10_000);
  }
  const phase = (name: PhaseResult["name"], figures: TimelineFigures): PhaseResult => ({
    ...{ name, backup: undefined, timeline: figures },
    guest: { writeCount: 1, seconds: 1, iops: 1, averageMs: 1, p99Ms: 1, longestMs: 1 },
  });

  it("shows them before, during and after the backup, in 80 columns", () => {
    const lines = timelinePictures([phase("unbuffered", timeline())], { columns: 200, isColoured: false });
    expect(Math.max(...lines.map(({ length }) => length))).toBeLessThanOrEqual(80);
    const [, name, top = "", , , bottom = "", marks = ""] = lines;
    expect(name).toBe("unbuffered");
    // Full, then nothing in the top row and a little in the lowest one, then full.
    expect(top).toMatch(/^ {2}1,\d{3} [█▇]+ +[█▇]+$/);
    // The column in which T0 falls is of both kinds.
    expect(bottom).toMatch(/^ +0 █+▃+█+$/);
    expect(bottom.indexOf("▃")).toBe(marks.indexOf("└T0") + 1);
    expect(marks.slice(marks.lastIndexOf("└"))).toBe("└end, 6.0 s");
    expect(bottom.lastIndexOf("▃") + 1).toBe(marks.lastIndexOf("└"));
  });

  it("colours what is during the backup", () => {
    const [, , , , , bottom] = timelinePictures([phase("buffered", timeline())], {
      columns: 80,
      isColoured: true,
    });
    expect(bottom).toMatch(/█+\u001b\[36m█▃+\u001b\[0m█+$/);
  });

  it("keeps a bounded number of slots, of whatever a long run there was", () => {
    const line = new Timeline(0);
    for (let ms = 0; ms < 3_600_000; ms += 50) line.record(ms);
    const { writes, slotMs } = line.figures(3_600_000);
    expect(writes.length).toBeLessThanOrEqual(600);
    expect(writes.reduce((sum, count) => sum + count, 0)).toBe(72_000);
    expect(writes.slice(0, -1).every((count) => count === slotMs / 50)).toBe(true);
  });
});
