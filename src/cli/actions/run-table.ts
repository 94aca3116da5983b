// What a run says at its end: a table of jobs that fits 80 columns.
import type { JobResult } from "../../run/result.js";
import { formatBytes, formatDuration } from "../../units.js";
import { fitColumns } from "../output/columns.js";

export function summaryTable(results: readonly JobResult[]): string[] {
  if (results.length === 0) return ["no job"];
  const rows = results.map((result) => {
    const { job, seconds, disks, level, removed } = result;
    const written = disks.reduce((sum, disk) => sum + disk.bytes_written, 0);
    const waitMs = Math.max(0, ...disks.map((disk) => disk.guest_wait_ms_max));
    return [
      job,
      result.exit_code === 0 || result.result === "skipped"
        ? result.result
        : `${result.result} (${result.exit_code})`,
      level ?? "-",
      disks.length === 0 ? "-" : formatBytes(written),
      formatDuration(seconds * 1000),
      disks.length === 0 ? "-" : formatDuration(waitMs),
      String(removed.length),
    ];
  });
  return fitColumns([["JOB", "RESULT", "LEVEL", "WRITTEN", "TIME", "WAIT", "REMOVED"], ...rows]);
}
