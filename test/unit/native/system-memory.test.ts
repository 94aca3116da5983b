// How much memory there is, from files as the kernel writes them; and who asks before taking it.
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { BufferStore } from "../../../src/backup/memory/buffer-store.js";
import { checkBufferMemory } from "../../../src/cli/actions/buffer-memory.js";
import { CowcatcherError } from "../../../src/errors.js";
import { systemMemory, type SystemMemory } from "../../../src/native/memory.js";
import { GiB, KiB, MiB } from "../../../src/units.js";

describe("systemMemory", () => {
  let root: string;

  beforeEach(() => {
    root = mkdtempSync(join(tmpdir(), "memory-"));
    write(
      "proc/meminfo",
      "MemTotal:       8388608 kB\nMemFree:  1 kB\nMemAvailable:   4194304 kB\nSwapFree:  1024 kB\n",
    );
  });

  afterEach(() => {
    rmSync(root, { recursive: true });
  });

  function write(path: string, text: string): void {
    const full = join(root, path);
    mkdirSync(dirname(full), { recursive: true });
    writeFileSync(full, text);
  }

  function group(path: string, max: string, current: string, stat: string): void {
    write(`sys/fs/cgroup/${path}memory.max`, `${max}\n`);
    write(`sys/fs/cgroup/${path}memory.current`, `${current}\n`);
    write(`sys/fs/cgroup/${path}memory.stat`, stat);
  }

  it("is the machine's", () => {
    expect(systemMemory(root)).toEqual({ totalBytes: 8 * GiB, availableBytes: 4 * GiB, freeSwapBytes: MiB });
  });

  it("is the control group's where that has less, its page cache being free", () => {
    write("proc/self/cgroup", "0::/vm.slice/serve.service\n");
    const cache = "anon 1\ninactive_file 4096\nactive_file 8192\n";
    group("vm.slice/serve.service/", String(GiB), String(GiB - 4096), cache);
    expect(systemMemory(root)).toMatchObject({ totalBytes: GiB, availableBytes: 4 * 4096 });
  });

  it("is that of the group above where that has least", () => {
    write("proc/self/cgroup", "0::/vm.slice/serve.service\n");
    group("vm.slice/serve.service/", "max", "5", "");
    group("vm.slice/", String(512 * MiB), String(500 * MiB), "");
    expect(systemMemory(root)).toMatchObject({ totalBytes: 512 * MiB, availableBytes: 12 * MiB });
  });

  it("does not say what the system does not", () => {
    rmSync(join(root, "proc"), { recursive: true });
    expect(systemMemory(root)).toMatchObject({ availableBytes: undefined, freeSwapBytes: 0 });
  });

  it("makes sense here", () => {
    const { totalBytes, availableBytes = 0 } = systemMemory();
    expect(totalBytes).toBeGreaterThan(64 * MiB);
    expect(availableBytes).toBeGreaterThan(0);
    expect(availableBytes).toBeLessThanOrEqual(totalBytes);
  });
});

describe("the buffer of a server's jobs", () => {
  const memory: SystemMemory = { totalBytes: 2 * GiB, availableBytes: GiB, freeSwapBytes: 0 };

  function check(bytes: number, quiet = false): string {
    let stderr = "";
    const text = { write: (part: string) => (stderr += part) };
    const output = { json: false, quiet, progress: undefined, stdout: text, stderr: text };
    checkBufferMemory(bytes, output, memory);
    return stderr;
  }

  it("is not spoken of where there is room", () => {
    expect(check(GiB)).toBe("");
  });

  it("is warned of where there is no room now", () => {
    expect(check(GiB + KiB)).toMatch(/^cowcatcher: warning: --cow-buffer-size: 1\.00 GiB is more than .*\n$/);
    expect(check(GiB + KiB, true)).toBe("");
  });

  it("is refused where there never is", () => {
    expect(() => check(2 * GiB + 1)).toThrow(
      expect.objectContaining({ code: "USAGE", object: "--cow-buffer-size" }) as CowcatcherError,
    );
  });
});

describe("the buffer of a job", () => {
  it("is refused rather than the process ended by the kernel", () => {
    const store = new BufferStore(() => ({ totalBytes: GiB, availableBytes: MiB, freeSwapBytes: MiB }));
    expect(() => store.take(2 * MiB + 1)).toThrow(
      /^--cow-buffer-size: 2\.00 MiB is more than the memory that is free, 1\.00 MiB \(give less, or free some\)$/,
    );
  });

  it("is taken where memory and swap suffice, and again without asking", () => {
    let availableBytes = MiB;
    const store = new BufferStore(() => ({ totalBytes: GiB, availableBytes, freeSwapBytes: MiB }));
    const lease = store.take(2 * MiB);
    expect(lease.memory.byteLength).toBe(2 * MiB);
    lease.release();
    availableBytes = 0;
    expect(store.take(2 * MiB).memory).toBe(lease.memory);
  });
});
