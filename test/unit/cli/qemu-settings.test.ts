// The options of `backup --qmp`.
import { Command } from "commander";
import { describe, expect, it } from "vitest";
import { addBackupOptions, parseBackupSettings } from "../../../src/cli/options/backup-options.js";

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
