// `bench`'s options: their defaults, and each usage error with its exact line.
import { tmpdir } from "node:os";
import { describe, expect, it } from "vitest";
import { parseBenchSettings } from "../../../src/cli/options/bench-options.js";
import { runProgram } from "../../../src/cli/program.js";
import { GiB, KiB, MiB } from "../../../src/units.js";

const SIZE_ADVICE = "(give 1M or more, a multiple of 512, and not less than --block-size)";

describe("bench", () => {
  it("takes its defaults", () => {
    expect(parseBenchSettings({})).toEqual({
      dir: tmpdir(),
      sizeBytes: GiB,
      format: "raw",
      target: undefined,
      targetFormat: "raw",
      force: false,
      rateLimitBytes: 50 * MiB,
      cowBufferSizeBytes: 256 * MiB,
      onBufferFull: "spill",
      blockBytes: 32 * KiB,
      ioDepth: 8,
      runtimeMs: 5000,
      backupTimeoutMs: 120_000,
      direct: false,
      plot: undefined,
    });
  });

  it("takes the target's format from its extension, unless one is given", () => {
    expect(parseBenchSettings({ target: "/x.qcow2" }).targetFormat).toBe("qcow2");
    expect(parseBenchSettings({ target: "/x.qcow2", targetFormat: "raw" }).targetFormat).toBe("raw");
    expect(parseBenchSettings({ target: "/x" }).targetFormat).toBe("raw");
  });

  it.each([
    ["--size 1K", `--size: 1024 is no size for the test disk ${SIZE_ADVICE}`],
    ["--size 1M --block-size 2M", `--size: 1048576 is no size for the test disk ${SIZE_ADVICE}`],
    ["--block-size 1000", "--block-size: 1000 is not a multiple of 512 up to 32M"],
    ["--block-size 0", "--block-size: 0 is not a multiple of 512 up to 32M"],
    [
      "--block-size 32M --iodepth 1024",
      "--iodepth: 1024 writes of 33554432 bytes are more than 1G in flight",
    ],
    ["--iodepth 0", "--iodepth: '0' is not a number from 1 to 1024"],
    ["--runtime 1ms", "--runtime: 1 ms is out of bounds (give 100ms to 24h)"],
    ["--backup-timeout 25h", "--backup-timeout: 90000000 ms is out of bounds (give 0ms to 24h)"],
    [
      "--cow-buffer-size 0",
      "--cow-buffer-size: 0 is no buffer (the unbuffered backup is measured in any case)",
    ],
    ["--on-buffer-full cancel", "--on-buffer-full: 'cancel' is not known (give spill or wait)"],
    ["-f vmdk", "--format: 'vmdk' is not known (give raw or qcow2)"],
    ["--force", "--force: needs a --target that is a device or an export"],
    ["now", "bench: too many arguments (see cowcatcher bench --help)"],
  ])("refuses %s", async (args, line) => {
    let [stdout, stderr] = ["", ""];
    const code = await runProgram(["bench", ...args.split(" ")], {
      stdout: { write: (text) => (stdout += text) },
      stderr: { write: (text) => (stderr += text) },
      environment: {},
    });
    expect({ code, stdout, stderr }).toEqual({ code: 2, stdout: "", stderr: `cowcatcher: ${line}\n` });
  });
});
