// What virsh complains of, in one line each; and the file for old data, which is watched.
import { chmodSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { JOB_DEFAULTS, type JobOptions } from "../../../src/backup/options.js";
import type { CowcatcherError } from "../../../src/errors.js";
import { checkRoom, FREE_BYTES_MIN, ScratchKeeper } from "../../../src/libvirt/scratch-keeper.js";
import { Virsh } from "../../../src/libvirt/virsh.js";
import { MiB } from "../../../src/units.js";

describe("Virsh", () => {
  let folder = "";
  beforeEach(() => {
    folder = mkdtempSync(join(tmpdir(), "cowcatcher-virsh-"));
    vi.stubEnv("PATH", `${folder}:${process.env["PATH"] ?? ""}`);
  });
  afterEach(() => {
    vi.unstubAllEnvs();
    rmSync(folder, { recursive: true });
  });

  function script(text: string): void {
    const path = join(folder, "virsh");
    writeFileSync(path, `#!/bin/sh\n${text}\n`);
    chmodSync(path, 0o755);
  }

  it("names the domain and the hypervisor as options, so that no name is taken for one", async () => {
    script('printf "%s\\n" "$LC_ALL" "$@"');
    const words = (await new Virsh("qemu:///system", "-x").run("dumpxml", "--a=b")).trimEnd().split("\n");
    expect(words).toEqual(["C", "--quiet", "--connect=qemu:///system", "dumpxml", "--domain=-x", "--a=b"]);
  });

  it.each([
    [
      "error: failed to connect to the hypervisor\nerror: Failed to connect socket to '/s': Connection refused",
      "qemu:///x: cannot connect to libvirt: Failed to connect socket to '/s': Connection refused (does libvirtd",
    ],
    ["error: failed to get domain 'vm1'", "vm1: libvirt at qemu:///x has no such domain"],
    ["error: Requested operation\n\nerror: more", "vm1: virsh dumpxml: Requested operation: more"],
    ["", "vm1: virsh dumpxml: failed without a word"],
  ])("makes one line of %j", async (stderr, line) => {
    script(`printf "%s\\n" "${stderr.replaceAll("\n", '" "')}" >&2; exit 1`);
    await expect(new Virsh("qemu:///x", "vm1").run("dumpxml")).rejects.toThrow(line);
  });

  it("says that it is not installed", async () => {
    vi.stubEnv("PATH", folder);
    await expect(new Virsh(undefined, "vm1").run("dumpxml")).rejects.toMatchObject({
      code: "NOT_FOUND",
      message: expect.stringContaining("virsh: is not installed, and --libvirt works through it") as string,
    });
  });
});

describe("ScratchKeeper", () => {
  const disk = {
    name: "vda",
    format: "qcow2",
    isReadOnly: false,
    isInIothread: false,
    node: { sizeBytes: 64 * MiB },
  } as const;

  function watched(job: Partial<JobOptions>, freeBytes = 1024 * MiB) {
    const state = { usedBytes: 200_000 as number | undefined, freeBytes };
    const storage = { usedBytes: () => state.usedBytes, freeBytes: () => state.freeBytes };
    const place = { folder: "/f", path: "/f/run/0.scratch" };
    const keeper = new ScratchKeeper(place, disk, { ...JOB_DEFAULTS, ...job } as JobOptions, storage);
    const errors: CowcatcherError[] = [];
    keeper.attach(undefined, (error) => errors.push(error));
    keeper.look();
    return { keeper, errors, state };
  }

  it("counts what the guest has overwritten, not what the empty file takes", () => {
    const { keeper, state } = watched({ cowBufferSizeBytes: MiB });
    expect(keeper.progress()).toMatchObject({ capturedBytes: 0, captureCount: 0 });
    state.usedBytes = 200_000 + 3 * MiB;
    keeper.look();
    expect(keeper.progress()).toMatchObject({
      capturedBytes: 3 * MiB,
      bufferBytesUsed: MiB,
      spilledBytes: 2 * MiB,
    });
  });

  it.each([
    ["spill", 2 * MiB],
    ["cancel", MiB],
  ] as const)("ends with %s before %i bytes could be passed", (onBufferFull, limitBytes) => {
    const { keeper, errors, state } = watched({
      cowBufferSizeBytes: MiB,
      spillLimitBytes: MiB,
      onBufferFull,
    });
    state.usedBytes = 200_000 + limitBytes / 2;
    keeper.look();
    expect(errors).toEqual([]);
    state.usedBytes += limitBytes / 2;
    keeper.look();
    expect(errors[0]).toMatchObject({ code: "BUFFER_FULL", object: "vda" });
  });

  it("ends while the guest still has room to write to", () => {
    const { keeper, errors, state } = watched({});
    state.freeBytes = FREE_BYTES_MIN / 2 - 1;
    keeper.look();
    expect(errors[0]).toMatchObject({ code: "BUFFER_FULL", object: "/f" });
  });

  it("says nothing of a file that has gone with the job", () => {
    const { keeper, errors, state } = watched({});
    state.usedBytes = undefined;
    keeper.look();
    expect(errors).toEqual([]);
  });

  it("is not begun where there is no room", () => {
    const storage = { usedBytes: () => 0, freeBytes: () => FREE_BYTES_MIN - 1 };
    expect(() => checkRoom("/f", storage)).toThrow(
      expect.objectContaining({ code: "NO_SPACE", object: "/f" }),
    );
    storage.freeBytes = () => FREE_BYTES_MIN;
    checkRoom("/f", storage);
  });
});
