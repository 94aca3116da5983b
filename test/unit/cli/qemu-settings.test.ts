// The options of `backup --qmp`.
import { Command } from "commander";
import { describe, expect, it } from "vitest";
import { addBackupOptions, parseBackupSettings } from "../../../src/cli/options/backup-options.js";
import {
  addRepositoryBackupOptions,
  parseRepositoryBackup,
} from "../../../src/cli/options/repository-backup.js";

function settings(...args: string[]): ReturnType<typeof parseBackupSettings> {
  const command = addBackupOptions(new Command().argument("[ARGUMENTS...]").exitOverride());
  command.parse(args, { from: "user" });
  return parseBackupSettings(command.args, command.opts());
}

describe("backup --qmp", () => {
  it("has a method, a folder and no server by default", () => {
    expect(settings("--qmp", "/run/q.sock", "/b/out.qcow2")).toMatchObject({
      mode: "qemu",
      monitor: "/run/q.sock",
      method: "auto",
      fleeceDir: "/var/tmp",
      server: undefined,
      acceptGuestRisk: false,
      disks: [{ disk: undefined, job: { target: "/b/out.qcow2", targetFormat: "qcow2" } }],
    });
  });

  it.each([
    ["/run/nbd.sock", { path: "/run/nbd.sock" }],
    ["127.0.0.1:10809", { host: "127.0.0.1", port: 10_809 }],
    ["[::1]:10809", { host: "::1", port: 10_809 }],
  ])("takes --nbd %s", (text, server) => {
    expect(settings("--qmp", "/q", "--nbd", text, "/b/a.img")).toMatchObject({ server });
  });

  it.each([
    [["--nbd", "host"], "--nbd"],
    [["--nbd", "host:0"], "--nbd"],
    [["--nbd", "host:70000"], "--nbd"],
    [["--spill-dir", "/tmp"], "--spill-dir"],
    [["--sync", "top"], "--sync"],
    [["--sync", "none"], "--sync"],
    [["--bitmap", "b0"], "--bitmap"],
    [["--control", "/c"], "--qmp"],
    [["-f", "raw"], "--source-format"],
    [["--snapshot", "s"], "--snapshot"],
    [["--dry-run"], "--dry-run"],
    [["--disk", "a", "--disk", "b"], "TARGET"],
    [["--since", "monday"], "--since"],
    [["--checkpoint", "monday"], "--checkpoint"],
    [["--cleanup"], "/b/a.img"],
  ])("refuses %s by name", (args, object) => {
    expect(() => settings("--qmp", "/q", ...args, "/b/a.img")).toThrow(expect.objectContaining({ object }));
  });

  it.each(["--qemu-method=filter", "--fleece-dir=/x", "--nbd=/x", "--accept-guest-risk", "--cleanup"])(
    "%s needs it",
    (option) => {
      expect(() => settings(option, "/a.img", "/b.img")).toThrow("needs --qmp");
    },
  );
});

describe("backup --libvirt", () => {
  it("takes a domain, and virsh's default of a hypervisor", () => {
    expect(settings("--libvirt", "vm1", "/b/out.qcow2")).toMatchObject({
      mode: "libvirt",
      domain: "vm1",
      connect: undefined,
      fleeceDir: "/var/tmp",
      disks: [
        { disk: undefined, bitmaps: undefined, job: { target: "/b/out.qcow2", targetFormat: "qcow2" } },
      ],
    });
  });

  it("has a chain by the files of its backups", () => {
    const chain = ["--bitmap", "auto", "-b", "0.qcow2", "-B", "qcow2", "--since-or-full"];
    expect(settings("--libvirt", "vm1", "--connect", "qemu:///system", ...chain, "/b/1.qcow2")).toMatchObject(
      {
        connect: "qemu:///system",
        disks: [{ bitmaps: { base: "/b/0.qcow2", orFull: true } }],
      },
    );
  });

  it.each([
    [["--qmp", "/q"], "--libvirt"],
    [["--control", "/c"], "--libvirt"],
    [["--qemu-method", "filter"], "--qemu-method"],
    [["--nbd", "/n"], "--nbd"],
    [["--guest-timeout", "3"], "--guest-timeout"],
    [["--on-cbw-error", "break-snapshot"], "--on-cbw-error"],
    [["--spill-dir", "/s"], "--spill-dir"],
    [["--sync", "top"], "--sync"],
    [["--bitmap", "theirs"], "--bitmap"],
    [["--dry-run"], "--dry-run"],
    [["--since", "monday"], "--since"],
    [["--cleanup"], "/b/a.img"],
  ])("refuses %s by name", (args, object) => {
    expect(() => settings("--libvirt", "vm1", ...args, "/b/a.img")).toThrow(
      expect.objectContaining({ object }),
    );
  });

  it("freezes by libvirt's word, or at a socket; the word is a file's name elsewhere", () => {
    const agent = (...args: string[]) => settings(...args, "--freeze", "libvirt", "/b/a.img");
    expect(agent("--libvirt", "vm1")).toMatchObject({ guestAgent: { agent: "libvirt" } });
    expect(agent("--qmp", "/q")).toMatchObject({
      guestAgent: { agent: expect.stringMatching(/^\/.*\/libvirt$/) as string },
    });
    expect(settings("--libvirt", "vm1", "--freeze", "./libvirt", "/b/a.img")).toMatchObject({
      guestAgent: { agent: expect.stringMatching(/^\/.*\/libvirt$/) as string },
    });
    expect(settings("--libvirt", "vm1", "--cleanup", "--freeze", "libvirt")).toMatchObject({
      guestAgent: "libvirt",
    });
  });

  it("keeps a base's bitmap, and ends one by its file", () => {
    const chain = ["--bitmap", "auto", "-b", "0.qcow2", "-B", "qcow2", "--bitmap-keeps-base"];
    const kept = { disks: [{ bitmaps: { base: "/b/0.qcow2", keepsBase: true } }] };
    for (const who of ["--qmp", "--libvirt"]) {
      expect(settings(who, "vm1", ...chain, "/b/1.qcow2")).toMatchObject(kept);
      expect(settings(who, "vm1", "--cleanup", "--bitmap-replaces", "/b/0.qcow2")).toMatchObject({
        replaced: ["/b/0.qcow2"],
      });
      expect(() => settings(who, "vm1", "--bitmap", "auto", "--bitmap-keeps-base", "/b/0.qcow2")).toThrow(
        "goes with an incremental backup",
      );
    }
    expect(() => settings("--freeze", "/s", "--cleanup", "--bitmap-replaces", "/b/0.qcow2")).toThrow(
      "needs --qmp or --libvirt",
    );
    expect(() => settings("--bitmap-keeps-base", "/a", "/b/0.qcow2")).toThrow("needs --qmp");
  });

  it("keeps a chain of files alone", () => {
    const target = "nbd://host/x";
    expect(() => settings("--libvirt", "vm1", "--bitmap", "auto", target)).toThrow(
      "needs a TARGET that is a file",
    );
  });

  it("cleans up, and --connect goes with it alone", () => {
    expect(settings("--libvirt", "vm1", "--connect", "u", "--cleanup")).toMatchObject({
      mode: "qemu-cleanup",
      monitor: undefined,
      domain: { domain: "vm1", connect: "u" },
    });
    for (const others of [
      ["--qmp", "/q", "/b"],
      ["--qmp", "/q", "--cleanup"],
      ["/a", "/b"],
    ]) {
      expect(() => settings("--connect", "u", ...others)).toThrow("needs --libvirt");
    }
  });
});

describe.each([
  ["--qmp", "/run/q.sock"],
  ["--libvirt", "vm1"],
])("backup %s --repo", (option, guest) => {
  function intoRepository(...args: string[]): ReturnType<typeof parseRepositoryBackup> {
    const command = addRepositoryBackupOptions(
      addBackupOptions(new Command().argument("[ARGUMENTS...]").exitOverride()),
    );
    command.parse([option, guest, "--repo", "/backup", "--group", "vm", ...args], { from: "user" });
    return parseRepositoryBackup(command.args, command.opts());
  }

  it.each<[string[], boolean]>([
    [[], true],
    [["--bitmap", "auto"], true],
    [["--bitmap", "none"], false],
  ])("with %s keeps bitmaps for the next one: %s", (args, keepsBitmaps) => {
    expect(intoRepository(...args)).toMatchObject({ mode: "repository-qemu", keepsBitmaps, level: "auto" });
  });

  it.each([
    [["--bitmap", "theirs"], "--bitmap"],
    [["--since-or-full"], "--since-or-full"],
    [["--bitmap", "auto", "--bitmap-replaces", "/b/0.qcow2"], "--bitmap-replaces"],
  ])("refuses %s by name", (args, object) => {
    expect(() => intoRepository(...args)).toThrow(expect.objectContaining({ object }));
  });
});
