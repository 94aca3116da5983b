// From flags to typed settings.
import { resolve } from "node:path";
import { Command } from "commander";
import { describe, expect, it } from "vitest";
import { JOB_DEFAULTS, OFFLINE_WORKER_COUNT } from "../../../src/backup/options.js";
import {
  addBackupOptions,
  addRestoreOptions,
  parseBackupSettings,
  parseRestoreSettings,
  type BackupSettings,
  type RestoreSettings,
} from "../../../src/cli/options/backup-options.js";
import type { JobSettings } from "../../../src/cli/options/job-settings.js";
import {
  formatByExtension,
  absoluteImage,
  isNbdUri,
  listWords,
  parseCount,
} from "../../../src/cli/options/options.js";
import {
  addServeOptions,
  parseServeSettings,
  type ServeSettings,
} from "../../../src/cli/options/serve-options.js";
import { GiB, MiB } from "../../../src/units.js";

function parsed(add: (command: Command) => Command, args: readonly string[]): Command {
  return add(new Command().argument("[ARGUMENTS...]")).exitOverride().parse(args, { from: "user" });
}

function backup(...args: string[]): BackupSettings {
  const command = parsed(addBackupOptions, args);
  return parseBackupSettings(command.args, command.opts());
}

function restore(...args: string[]): RestoreSettings {
  const command = parsed(addRestoreOptions, args);
  return parseRestoreSettings(command.args, command.opts());
}

function serve(args: string[], environment: Record<string, string> = {}): ServeSettings {
  const command = parsed(addServeOptions, args);
  return parseServeSettings(command.args, command.opts(), environment, 77);
}

function offlineJob(...args: string[]): JobSettings {
  const settings = backup(...args);
  if (settings.mode !== "offline") throw new Error("expected an offline backup");
  return settings.job;
}

describe("backup", () => {
  it("takes every default from the job's, but for the workers of an offline copy", () => {
    expect(backup("a.qcow2", "b.bin")).toEqual({
      mode: "offline",
      source: "a.qcow2",
      sourceFormat: undefined,
      job: {
        ...JOB_DEFAULTS,
        workerCount: OFFLINE_WORKER_COUNT,
        target: "b.bin",
        targetFormat: undefined,
      },
    });
  });

  it.each([
    ["-c a b", "zstd", 3],
    ["a -c b", "zstd", 3],
    ["a b -c", "zstd", 3],
    ["-c -f raw a b", "zstd", 3],
    ["--compress a -- b", "zstd", 3],
    ["-c zlib a b", "zlib", 6],
    ["-czlib:9 a b", "zlib", 9],
    ["a --compress zstd:1 b", "zstd", 1],
    ["--compress=zlib:1 a b", "zlib", 1],
  ])("knows what belongs to --compress in '%s'", (args, type, level) => {
    const settings = backup("-O", "qcow2", ...args.split(" "));
    expect(settings).toMatchObject({ source: "a", job: { target: "b", compression: { type, level } } });
  });

  it("takes arguments after -- as they are", () => {
    expect(backup("--", "-c", "zstd")).toMatchObject({ source: "-c", job: { target: "zstd" } });
  });

  const COPY_ARGS =
    "-O qcow2 --sync full -b base.qcow2 -B qcow2 -w 8 --cluster-size 128K --rate-limit 50M --direct --verify " +
    "--force --on-source-error ignore --on-target-error stop --target-retries 0";
  const COPY_JOB = {
    targetFormat: "qcow2",
    force: true,
    clusterSizeBytes: 131_072,
    backingFile: "base.qcow2",
    backingFormat: "qcow2",
    workerCount: 8,
    rateLimitBytes: 50 * MiB,
    onSourceError: "ignore",
    onTargetError: "stop",
    targetRetries: 0,
    direct: true,
    verify: true,
    sync: "full",
    snapshotExport: false,
  };

  it("takes every option of an offline copy", () => {
    expect(backup(...`-f raw ${COPY_ARGS} a b`.split(" "))).toEqual({
      mode: "offline",
      source: "a",
      sourceFormat: "raw",
      job: { ...JOB_DEFAULTS, ...COPY_JOB, target: "b" },
    });
  });

  it("takes every option of a live backup", () => {
    const args =
      "--control c --disk x --cow-buffer-size 1G --on-buffer-full spill --spill-dir sub --spill-limit 2G " +
      "--guest-timeout 500ms --on-cbw-error break-guest-write";
    const job = {
      ...COPY_JOB,
      target: resolve("b"),
      cowBufferSizeBytes: GiB,
      onBufferFull: "spill",
      spillDir: resolve("sub"),
      spillLimitBytes: 2 * GiB,
      guestTimeoutMs: 500,
      onCbwError: "break-guest-write",
    };
    expect(backup(...`${args} ${COPY_ARGS} b`.split(" "))).toEqual({
      mode: "live",
      control: resolve("c"),
      disks: [{ disk: "x", job }],
    });
  });

  it.each([
    ["b.raw", "raw"],
    ["b.img", "raw"],
    ["b.IMG", "raw"],
    ["b.qcow2", "qcow2"],
    ["b.qcow", "qcow2"],
    ["dir.img/b", undefined],
    ["b", undefined],
    ["null:", undefined],
  ])("takes the format of %s from its extension", (target, format) => {
    expect(offlineJob("a", target).targetFormat).toBe(format);
  });

  it("prefers -O to the extension", () => {
    expect(offlineJob("-O", "raw", "a", "b.qcow2").targetFormat).toBe("raw");
  });

  it("keeps 0 as a buffer size", () => {
    expect(backup("--control", "c", "--cow-buffer-size", "0", "b")).toMatchObject({
      disks: [{ job: { cowBufferSizeBytes: 0 } }],
    });
  });

  it("makes live targets absolute, as the server's folder may be another", () => {
    const settings = backup("--control", "c.sock", "--disk", "x", "--disk", "y", "a.img", "null:");
    if (settings.mode !== "live") throw new Error("expected a live backup");
    expect(settings.control).toBe(resolve("c.sock"));
    expect(settings.disks.map(({ disk, job }) => [disk, job.target, job.targetFormat])).toEqual([
      ["x", resolve("a.img"), "raw"],
      ["y", "null:", undefined],
    ]);
  });

  it("leaves the server's only disk and its buffer size to the server", () => {
    const settings = backup("--control", "c", "t");
    if (settings.mode !== "live") throw new Error("expected a live backup");
    expect(settings.disks).toHaveLength(1);
    expect(settings.disks[0]?.disk).toBeUndefined();
    expect(settings.disks[0]?.job.cowBufferSizeBytes).toBeUndefined();
  });

  it("allows null: for several disks", () => {
    const settings = backup("--control", "c", "--disk", "x", "--disk", "y", "null:", "null:");
    expect(settings.mode).toBe("live");
  });
});

describe("restore", () => {
  it("is an offline copy of the backup", () => {
    expect(restore("--force", "-w", "2", "b.qcow2", "disk.img")).toEqual({
      mode: "offline",
      source: "b.qcow2",
      sourceFormat: undefined,
      job: { ...JOB_DEFAULTS, target: "disk.img", targetFormat: "raw", force: true, workerCount: 2 },
    });
  });
});

describe("serve", () => {
  it("takes its defaults", () => {
    expect(serve(["--socket", "s", "a.qcow2"])).toEqual({
      images: [{ path: "a.qcow2", name: "disk", format: undefined }],
      listen: { type: "unix", path: "s", mode: undefined, groupId: undefined },
      control: undefined,
      readOnly: false,
      direct: false,
      cowBufferSizeBytes: 256 * MiB,
      preallocate: false,
      metrics: undefined,
      snapshotExport: false,
      controlAccess: { mode: undefined, groupId: undefined },
      tracking: { mode: "host", directory: undefined, isAskedFor: false },
      maxConnections: 128,
      bitmaps: [],
      tls: undefined,
    });
  });

  it("takes every option", () => {
    const args =
      "--port 0 --bind ::1 --control c -f raw --read-only --name root --cow-buffer-size 1G --max-connections 3 " +
      "--preallocate --snapshot-export --bitmap b0 --bitmap b1 --bitmap b0 --tls require --tls-certificates d --tls-verify-peer a";
    expect(serve(args.split(" "))).toEqual({
      images: [{ path: "a", name: "root", format: "raw" }],
      listen: { type: "tcp", address: "::1", port: 0 },
      control: "c",
      readOnly: true,
      direct: false,
      cowBufferSizeBytes: GiB,
      preallocate: true,
      metrics: undefined,
      snapshotExport: true,
      controlAccess: { mode: undefined, groupId: undefined },
      tracking: { mode: "host", directory: undefined, isAskedFor: false },
      maxConnections: 3,
      bitmaps: ["b0", "b1"],
      tls: { kind: "certificates", folder: "d", verifyPeer: true },
    });
  });

  it.each([
    ["a.img=root", "a.img", "root"],
    ["a=b.img=root", "a=b.img", "root"],
    ["/x=1/a.img", "/x=1/a.img", "disk"],
    ["a.img=", "a.img=", "disk"],
    ["=x", "=x", "disk"],
  ])("splits %s", (text, path, name) => {
    expect(serve(["--socket", "s", text]).images).toEqual([{ path, name, format: undefined }]);
  });

  it.each([
    [[], undefined],
    [["--tls", "off"], undefined],
    [["--tls-certificates", "d"], { kind: "certificates", folder: "d", verifyPeer: false }],
    [["--tls-psk", "f"], { kind: "psk", file: "f" }],
    [["--tls", "require", "--tls-psk", "f"], { kind: "psk", file: "f" }],
  ])("requires TLS where it has something to do it with: %j", (args, tls) => {
    expect(serve(["--socket", "s", ...args, "a"]).tls).toEqual(tls);
  });

  it("takes a socket's mode in octal", () => {
    expect(serve(["--socket", "s", "--socket-mode", "0660", "a"]).listen).toMatchObject({
      mode: 0o660,
      groupId: undefined,
    });
  });

  it("takes systemd's sockets if they are meant for this process", () => {
    expect(serve(["a"], { LISTEN_FDS: "2", LISTEN_PID: "77" }).listen).toEqual({
      type: "inherited",
      count: 2,
    });
    expect(() => serve(["a"], { LISTEN_FDS: "2", LISTEN_PID: "78" })).toThrow(
      "does not know where to listen",
    );
    expect(() => serve(["a"], { LISTEN_FDS: "0", LISTEN_PID: "77" })).toThrow(
      "does not know where to listen",
    );
  });

  it("prefers the socket that was named to systemd's", () => {
    const { listen } = serve(["--socket", "s", "a"], { LISTEN_FDS: "1", LISTEN_PID: "77" });
    expect(listen).toEqual({ type: "unix", path: "s" });
  });
});

describe("parsers", () => {
  it("knows NBD URIs by their scheme", () => {
    for (const uri of ["nbd://h", "nbds://h/x", "nbd+unix:///x?socket=s", "nbds+unix:///", "NBD://h"]) {
      expect(isNbdUri(uri)).toBe(true);
    }
    for (const path of ["nbd", "nbd:/x", "./nbd://x", "nbdx://h", "disk.img"])
      expect(isNbdUri(path)).toBe(false);
  });

  it("makes the paths in an NBD URI absolute for another process", () => {
    const folder = encodeURIComponent(process.cwd()).replaceAll("%2F", "/");
    expect(absoluteImage("nbds+unix:///d?socket=s&tls-certificates=pki")).toBe(
      `nbds+unix:///d?socket=${folder}/s&tls-certificates=${folder}/pki`,
    );
    expect(absoluteImage("nbd://h/d")).toBe("nbd://h/d");
    expect(absoluteImage("a")).toBe(`${process.cwd()}/a`);
  });

  it("tells an export's name from a URI's own equals signs", () => {
    const names = (image: string): unknown => serve(["--socket", "s", image]).images;
    expect(names("nbd+unix:///d?socket=rel.sock")).toMatchObject([
      { path: `nbd+unix:///d?socket=${process.cwd()}/rel.sock`, name: "disk" },
    ]);
    expect(names("nbd+unix:///d?socket=/x/rel.sock=root")).toMatchObject([
      { path: "nbd+unix:///d?socket=/x/rel.sock", name: "root" },
    ]);
    expect(names("nbd://h/d=root")).toMatchObject([{ path: "nbd://h/d", name: "root" }]);
  });

  it("knows formats by extension alone", () => {
    expect(formatByExtension("a.qcow2.tmp")).toBeUndefined();
    expect(formatByExtension(".img")).toBe("raw");
    expect(formatByExtension("nbd://h/disk.qcow2")).toBe("raw");
    expect(formatByExtension("constructor.constructor")).toBeUndefined();
  });

  it("parses counts within their bounds", () => {
    const bounds = { min: 1, max: 10 };
    expect(parseCount("10", "N", bounds)).toBe(10);
    for (const bad of ["0", "11", "1.5", "0x1", "", " 1", "1e1"]) {
      expect(() => parseCount(bad, "N", bounds)).toThrow("is not a number from 1 to 10");
    }
  });

  it("lists words", () => {
    expect([listWords(["a"]), listWords(["a", "b"]), listWords(["a", "b", "c"])]).toEqual([
      "a",
      "a or b",
      "a, b or c",
    ]);
  });
});
