// Errors, the jobs table, and the texts that follow qemu-img's.
import { describe, expect, it } from "vitest";
import { checkLines } from "../../../src/cli/actions/check.js";
import { COMMAND_NAMES, exitCodeOfError } from "../../../src/cli/output/exit-codes.js";
import { infoLines, type ImageInfoDocument } from "../../../src/cli/output/info-text.js";
import { jobDocument, jobLines } from "../../../src/cli/actions/jobs.js";
import { mergedEntries, type MapEntry } from "../../../src/cli/actions/map.js";
import { qemuHex, qemuSize } from "../../../src/cli/output/qemu-text.js";
import { errorLine, errorMessage } from "../../../src/cli/output/report.js";
import type { JobSummary } from "../../../src/control/jobs-from-qmp.js";
import { CowcatcherError } from "../../../src/errors.js";
import type { BlockStatus } from "../../../src/block/device.js";
import { GiB, KiB, MiB, TiB } from "../../../src/units.js";

const UTC = /^\d{4}-\d\d-\d\dT[\d:.]+Z$/;

describe("errors", () => {
  const error = new CowcatcherError({
    code: "IO",
    object: "disk\nname\u001b[31m",
    problem: "cannot read: input/output error",
    hint: "look at the drive",
    offsetBytes: 4096,
    errno: "EIO",
  });

  it("are one line, whatever a file is called", () => {
    expect(errorLine(error)).toBe(
      "cowcatcher: disk name?[31m: cannot read: input/output error at offset 4096 (look at the drive)",
    );
  });

  it("are complete in JSON", () => {
    expect(errorMessage(error)).toEqual({
      message_type: "error",
      time: expect.stringMatching(UTC) as string,
      error: {
        code: "IO",
        object: "disk\nname\u001b[31m",
        problem: "cannot read: input/output error",
        hint: "look at the drive",
        offset: 4096,
        errno: "EIO",
        message: error.message,
      },
    });
  });

  it("lead to the exit codes of CLI.md", () => {
    const usage = new CowcatcherError({ code: "USAGE", object: "x", problem: "y" });
    const expected = { check: [1, 1], compare: [2, 2] } as Record<string, [number, number]>;
    for (const name of COMMAND_NAMES) {
      expect([exitCodeOfError(name, error), exitCodeOfError(name, usage)]).toEqual(expected[name] ?? [1, 2]);
    }
    expect(exitCodeOfError(undefined, usage)).toBe(2);
  });
});

describe("numbers as qemu-img prints them", () => {
  it.each([
    [0, "0 B"],
    [999, "999 B"],
    [1000, "0.977 KiB"],
    [1024, "1 KiB"],
    [196 * KiB, "196 KiB"],
    [3_420_160, "3.26 MiB"],
    [1000 * KiB, "0.977 MiB"],
    [10 * GiB, "10 GiB"],
    [64 * TiB, "64 TiB"],
  ])("%i bytes is %s", (bytes, text) => {
    expect(qemuSize(bytes)).toBe(text);
  });

  it("writes offsets as printf's %#x", () => {
    expect([qemuHex(0), qemuHex(65_536)]).toEqual(["0", "0x10000"]);
  });
});

describe("info", () => {
  const info: ImageInfoDocument = {
    filename: "d/a.qcow2",
    format: "qcow2",
    "virtual-size": 10 * MiB,
    "actual-size": 196 * KiB,
    "dirty-flag": true,
    "cluster-size": 65_536,
    encrypted: true,
    "backing-filename": "b.raw",
    "full-backing-filename": "d/b.raw",
    "backing-filename-format": "raw",
    "format-specific": {
      type: "qcow2",
      data: { compat: "1.1", "compression-type": "zlib", "refcount-bits": 16, encrypt: { format: "luks" } },
    },
  };

  it("has qemu-img's lines in qemu-img's order", () => {
    expect(infoLines(info)).toEqual([
      "image: d/a.qcow2",
      "file format: qcow2",
      "virtual size: 10 MiB (10485760 bytes)",
      "disk size: 196 KiB",
      "encrypted: yes",
      "cluster_size: 65536",
      "cleanly shut down: no",
      "backing file: b.raw (actual path: d/b.raw)",
      "backing file format: raw",
      "Format specific information:",
      "    compat: 1.1",
      "    compression type: zlib",
      "    refcount bits: 16",
      "    encrypt:",
      "        format: luks",
    ]);
  });
});

describe("check", () => {
  const sound = {
    checkErrors: 0,
    corruptions: 0,
    leaks: 0,
    imageEndOffset: 262_144,
    totalClusters: 160,
    allocatedClusters: 0,
    fragmentedClusters: 0,
    compressedClusters: 0,
  };

  it("has qemu-img's lines", () => {
    expect(checkLines(sound)).toEqual(["No errors were found on the image.", "Image end offset: 262144"]);
    expect(
      checkLines({
        ...sound,
        corruptions: 4,
        leaks: 2,
        checkErrors: 1,
        allocatedClusters: 48,
        compressedClusters: 12,
      }),
    ).toEqual([
      "",
      "4 errors were found on the image.",
      "Data may be corrupted, or further writes to the image may corrupt it.",
      "",
      "2 leaked clusters were found on the image.",
      "This means waste of disk space, but no harm to data.",
      "",
      "1 internal errors have occurred during the check.",
      "48/160 = 30.00% allocated, 0.00% fragmented, 25.00% compressed clusters",
      "Image end offset: 262144",
    ]);
  });
});

describe("map", () => {
  async function merged(runs: Partial<BlockStatus>[], isAsync: boolean): Promise<MapEntry[]> {
    const statuses = new Map<number, BlockStatus>();
    let at = 0;
    for (const run of runs) {
      const status = {
        lengthBytes: 10,
        zero: false,
        data: true,
        depth: 0,
        present: true,
        compressed: false,
        ...run,
      };
      statuses.set(at, status);
      at += status.lengthBytes;
    }
    const blockStatus = (offset: number): BlockStatus | Promise<BlockStatus> => {
      const status = statuses.get(offset);
      if (status === undefined) throw new Error(`asked for ${offset}`);
      return isAsync ? Promise.resolve(status) : status;
    };
    const entries: MapEntry[] = [];
    const image = { blockStatus, backing: null, sizeBytes: at, files: [] };
    for await (const entry of mergedEntries(image, 0, at)) entries.push(entry);
    return entries;
  }

  it.each([false, true])(
    "makes neighbours one where their places follow on (asynchronous: %s)",
    async (isAsync) => {
      const runs = [{ hostOffsetBytes: 100 }, { hostOffsetBytes: 110 }, { hostOffsetBytes: 130 }];
      const kind = { depth: 0, present: true, zero: false, data: true };
      expect(await merged(runs, isAsync)).toEqual([
        { start: 0, length: 20, ...kind, offset: 100 },
        { start: 20, length: 10, ...kind, offset: 130 },
      ]);
    },
  );

  it.each([{ zero: true }, { data: false }, { hostOffsetBytes: 10 }])(
    "keeps neighbours apart that differ in %j",
    async (difference) => {
      expect(await merged([{}, difference, {}], false)).toHaveLength(3);
    },
  );
});

describe("jobs", () => {
  const job: JobSummary = {
    id: "root-1",
    status: "running",
    disk: "root",
    target: "/b/root.img",
    speed: 50 * MiB,
    progress: {
      bytesDone: GiB,
      bytesTotal: 4 * GiB,
      bytesWritten: GiB,
      bufferBytesUsed: 64 * MiB,
      bufferBytesTotal: 256 * MiB,
      captureCount: 3,
      capturedBytes: 12 * KiB,
      spilledBytes: 0,
      guestWaitCount: 0,
      guestWaitMsMax: 0,
      guestWaitMsTotal: 0,
      guestWaitCounts: [],
      targetRate: 40 * MiB,
      elapsedMs: 26_000,
      ignoredErrorCount: 0,
    },
  };

  it("are a table", () => {
    expect(jobLines([job])).toEqual([
      "ID      DISK  STATUS   DONE  RATE        LIMIT       TIME    BUFFER               TARGET",
      "root-1  root  running  25%   40.0 MiB/s  50.0 MiB/s  26.0 s  64.0 MiB of 256 MiB  /b/root.img",
    ]);
    expect(jobLines([])).toEqual(["ID  DISK  STATUS  DONE  RATE  LIMIT  TIME  BUFFER  TARGET"]);
  });

  it("are objects with the names of the status messages", () => {
    expect(jobDocument(job)).toMatchObject({
      job: "root-1",
      disk: "root",
      target: "/b/root.img",
      status: "running",
      rate: 40 * MiB,
      rate_limit: 50 * MiB,
      percent_done: 0.25,
      error: null,
    });
    expect(jobDocument(job)).not.toHaveProperty("message_type");
    const error = new CowcatcherError({ code: "NO_SPACE", object: "t", problem: "is full" });
    expect(jobDocument({ ...job, error }).error).toMatchObject({ code: "NO_SPACE", object: "t" });
  });
});
