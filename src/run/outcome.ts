// Between a job and what `backup --json` says of it: the summaries read, and the names of what is locked for it.
import { realpathSync } from "node:fs";
import type { Job } from "./job.js";
import type { PlannedDisk } from "./plan.js";
import type { DiskResult } from "./result.js";

/** What two runs must not do at once, in words that a user knows. */
export function lockKeys({ source, target }: Job): string[] {
  const keys =
    source.kind === "images"
      ? source.disks.map(({ image }) => `the disk ${real(image)}`)
      : [
          source.kind === "libvirt"
            ? `the domain ${[...(source.connect === undefined ? [] : [source.connect]), source.domain].join(" ")}`
            : `the guest of ${real(source.socket)}`,
        ];
  return target.kind === "repository" ? [...keys, `the repository ${real(target.repository)}`] : keys;
}

function real(path: string): string {
  try {
    return realpathSync(path);
  } catch {
    // An address, or not there: then under its own name.
    return path;
  }
}

export interface Outcome {
  disks: DiskResult[];
  level: "full" | "incremental" | undefined;
  levelReason: string | undefined;
}

/** Undefined without a summary. @param messages of one `backup`; @param planned its disks, in the order of its targets */
export function diskResults(
  messages: readonly unknown[],
  planned: readonly PlannedDisk[],
): Outcome | undefined {
  const summaries = messages.filter(isObject).filter(({ message_type }) => message_type === "summary");
  if (summaries.length === 0) return undefined;
  const whole = summaries.find(({ disks }) => Array.isArray(disks));
  if (whole !== undefined) return ofRepository(whole, planned);
  const disks = planned.map((disk, index) => {
    // Targets are no two the same; what the server calls the disk may be another name for it.
    const summary = summaries.find(({ target }) => target === disk.target) ?? summaries[index] ?? {};
    return { disk: disk.label, target: disk.target, ...diskResult(summary) };
  });
  const level = summaries[0]?.["level"];
  const reason = summaries[0]?.["bitmap_reason"];
  return {
    disks,
    level: level === "full" || level === "incremental" ? level : undefined,
    levelReason: typeof reason === "string" ? reason : undefined,
  };
}

function ofRepository(summary: JsonObject, planned: readonly PlannedDisk[]): Outcome {
  const disks = (Array.isArray(summary["disks"]) ? summary["disks"] : []).filter(isObject);
  const { level, level_reason: reason, target, t0 } = summary;
  return {
    disks: disks.map((found, index) => {
      const bytes = numberOf(found["new_bytes"]);
      const { disk } = found;
      return {
        disk: typeof disk === "string" ? disk : (planned[index]?.label ?? ""),
        target: typeof target === "string" ? target : "",
        ...diskResult({ ...found, t0 }),
        bytes_written: bytes,
        bytes_on_target: bytes,
        ignored_errors: index === 0 ? numberOf(summary["ignored_errors"]) : 0,
      };
    }),
    level: level === "full" || level === "incremental" ? level : undefined,
    levelReason: typeof reason === "string" ? reason : undefined,
  };
}

type JsonObject = Record<string, unknown>;

function diskResult(summary: JsonObject): Omit<DiskResult, "disk" | "target"> {
  const { t0, bytes_on_target: onTarget } = summary;
  const number = (name: string): number => numberOf(summary[name]);
  return {
    t0: typeof t0 === "string" ? t0 : null,
    bytes: number("bytes"),
    bytes_written: number("bytes_written"),
    bytes_on_target: typeof onTarget === "number" ? onTarget : null,
    captured_bytes: number("captured_bytes"),
    spilled_bytes: number("spilled_bytes"),
    guest_waits: number("guest_waits"),
    guest_wait_ms_max: number("guest_wait_ms_max"),
    guest_wait_ms_total: number("guest_wait_ms_total"),
    ignored_errors: number("ignored_errors"),
  };
}

function numberOf(value: unknown): number {
  return typeof value === "number" ? value : 0;
}

export function isObject(value: unknown): value is JsonObject {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
