// What somebody meets in the first week: who holds an image, who writes a target, what a job is called, what is said of
// odd sources, and why a backup ended.
import { execFileSync } from "node:child_process";
import * as fs from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { MiB } from "../../../src/units.js";
import { parseMounts } from "../../../src/cli/actions/source-warnings.js";
import { jobIdOf } from "../../../src/cli/actions/served-disks.js";
import { cowcatcher, run } from "../../support/cli.js";
import { Process, scratchFolder, Server, stopAll } from "../../support/server.js";
import { COWCATCHER_BIN } from "../../support/cli.js";

let folder: string;
const at = (name: string): string => join(folder, name);

beforeEach(() => {
  folder = scratchFolder();
  fs.writeFileSync(at("disk.raw"), Buffer.alloc(8 * MiB, 7));
});

afterEach(stopAll);

function messages(stdout: string): Record<string, unknown>[] {
  return stdout
    .split("\n")
    .filter((line) => line.startsWith("{"))
    .map((line) => JSON.parse(line) as Record<string, unknown>);
}

describe("an image that a server has open", () => {
  it("is said to be its, by process, with the way to back it up, or to read it", async () => {
    const server = await Server.start(folder, [at("disk.raw")]);
    const backup = await cowcatcher(["backup", at("disk.raw"), at("b.qcow2")]);
    expect(backup.code).toBe(1);
    expect(backup.stderr).toMatch(/disk\.raw: cowcatcher serve, process \d+, uses it: cannot get the .*lock/);
    expect(backup.stderr).toContain(`(back it up while it is used: --control ${server.control})`);
    for (const command of ["info", "map"]) {
      const { code, stderr } = await cowcatcher([command, at("disk.raw")]);
      expect([command, code]).toEqual([command, 1]);
      expect(stderr).toContain("-U opens it all the same");
      expect((await cowcatcher([command, "-U", at("disk.raw")])).code).toBe(0);
    }
    const compare = await cowcatcher(["compare", "--json", at("disk.raw"), at("disk.raw")]);
    expect(compare.code).toBe(2);
    expect(compare.stderr).toContain("-U opens it");
  });

  it("is said to be another program's where it is", async () => {
    // Nothing else may open the image before it has: with somebody's lock there it would give up.
    const commands = ["-c", "read 0 512", "-c", "sleep 600000"];
    const holder = new Process("stdbuf", ["-oL", "qemu-io", "-f", "raw", ...commands, at("disk.raw")]);
    await holder.line((line) => line.startsWith("read 512/512"));
    const { stderr } = await cowcatcher(["backup", at("disk.raw"), at("b.raw")]);
    expect(stderr).toMatch(/disk\.raw: qemu-io, process \d+, uses it: /);
    expect(stderr).toContain("end that program first");
    holder.kill("SIGKILL");
    await holder.ended;
  });
});

describe("a live backup", () => {
  it("has ids that count by disk, and a disk's name is enough for the one job that it has", async () => {
    const server = await Server.start(folder, [`${at("disk.raw")}=my disk`]);
    const control = ["--control", server.control];
    const first = await cowcatcher(["backup", "--json", ...control, at("a.raw")]);
    expect(first.stderr).toBe("");
    expect(messages(first.stdout)[0]).toMatchObject({ message_type: "started", job: "my_disk-1" });
    const slow = new Process(process.execPath, [
      ...[COWCATCHER_BIN, "backup", "--json", ...control, "--rate-limit", "64K", at("b.raw")],
    ]);
    await slow.line(() => true);
    expect(messages(slow.lines.join("\n"))[0]).toMatchObject({ job: "my_disk-2" });
    expect((await cowcatcher(["jobs", "pause", "my disk", ...control])).code).toBe(0);
    expect((await cowcatcher(["jobs", "set-speed", "my disk", "0", ...control])).code).toBe(0);
    expect((await cowcatcher(["jobs", "cancel", "my disk", ...control])).code).toBe(0);
    expect((await slow.ended).code).toBe(1);
  });

  it("tells its instant, its version, and what its target takes", async () => {
    const server = await Server.start(folder, [at("disk.raw")]);
    const before = Date.now();
    const { stdout } = await cowcatcher([
      "backup",
      "--json",
      "--control",
      server.control,
      "-O",
      "qcow2",
      "-c",
      at("a.qcow2"),
    ]);
    const started = messages(stdout).find((message) => message.message_type === "started");
    const summary = messages(stdout).find((message) => message.message_type === "summary");
    const t0 = Date.parse(String(summary?.t0));
    expect(t0).toBeGreaterThanOrEqual(before);
    expect(t0).toBeLessThanOrEqual(Date.now());
    expect(started).toMatchObject({ t0: summary?.t0, target_format: "qcow2", data_bytes: 8 * MiB });
    expect(summary).toMatchObject({
      target_format: "qcow2",
      bytes_written: 8 * MiB,
      bytes_on_target: fs.statSync(at("a.qcow2")).blocks * 512,
    });
    expect(summary?.bytes_on_target).toBeLessThan(1 * MiB);
  });

  it.each(["SIGTERM", "quit"])(
    "that loses its server by %s says that it was the server's end",
    async (how) => {
      const server = await Server.start(folder, [at("disk.raw")]);
      const backup = new Process(process.execPath, [
        ...[
          COWCATCHER_BIN,
          "backup",
          "--json",
          "--control",
          server.control,
          "--rate-limit",
          "64K",
          at("b.raw"),
        ],
      ]);
      await backup.line(() => true);
      if (how === "quit") await quit(server.control);
      else server.process.kill("SIGTERM");
      const { code, stderr, stdout } = await backup.ended;
      expect(code).toBe(1);
      expect(stderr).toContain("b.raw: the server was ended while the backup ran");
      expect(messages(stdout).at(-1)).toMatchObject({ error: { code: "SERVER_ENDED" } });
      expect(fs.existsSync(at("b.raw"))).toBe(false);
    },
  );

  it("says to what the buffer was raised", async () => {
    const server = await Server.start(folder, [at("disk.raw")], { args: ["--cow-buffer-size", "64K"] });
    expect(server.process.stderr).toContain("--cow-buffer-size: raised to 2.00 MiB");
    const args = [
      "backup",
      "--control",
      server.control,
      "--cow-buffer-size",
      "1K",
      "--rate-limit",
      "4M",
      at("b.raw"),
    ];
    const { code, stderr } = await cowcatcher(args);
    expect([code, stderr]).toEqual([0, expect.stringContaining("--cow-buffer-size: raised to 2.00 MiB")]);
  });

  it("can be measured before, with what is free", async () => {
    const server = await Server.start(folder, [at("disk.raw")]);
    const args = ["backup", "--dry-run", "--json", "--control", server.control, at("b.qcow2")];
    const { code, stdout } = await cowcatcher(args);
    expect(code).toBe(0);
    const document = JSON.parse(stdout) as Record<string, unknown>;
    expect(document).toMatchObject({ disk: "disk", target_format: "qcow2" });
    expect(document.required).toBeGreaterThan(8 * MiB);
    expect(document.free).toBeGreaterThan(0);
    expect(fs.existsSync(at("b.qcow2"))).toBe(false);
  });

  it.runIf(process.getuid?.() === 0)("names the server's user where a permission is missing", async () => {
    fs.chmodSync(folder, 0o755);
    fs.chmodSync(at("disk.raw"), 0o666);
    fs.mkdirSync(at("run"), { mode: 0o777 });
    fs.chmodSync(at("run"), 0o777);
    fs.mkdirSync(at("private"), { mode: 0o700 });
    const args = ["serve", "--socket", at("run/s"), "--control", at("run/c"), at("disk.raw")];
    const server = new Process("setpriv", [
      ...["--reuid=nobody", "--regid=nogroup", "--clear-groups", process.execPath, COWCATCHER_BIN, ...args],
    ]);
    await server.line(() => true);
    const { code, stderr } = await cowcatcher(["backup", "--control", at("run/c"), at("private/b.raw")]);
    expect(code).toBe(1);
    expect(stderr).toContain("permission denied for the server's user nobody");
    server.kill("SIGTERM");
    await server.ended;
  });

  it.runIf(process.getuid?.() === 0)("is taken from whom the control socket is open to", async () => {
    const server = await Server.start(folder, [at("disk.raw")], { args: ["--control-group", "daemon"] });
    const { mode, gid } = fs.statSync(server.control);
    expect([mode & 0o777, gid]).toEqual([
      0o660,
      Number(execFileSync("getent", ["group", "daemon"], { encoding: "utf8" }).split(":")[2]),
    ]);
    const other = scratchFolder();
    const open = await Server.start(other, [`${at("disk.raw")}`], {
      args: ["--read-only", "--control-mode", "666"],
    }).catch(() => undefined);
    if (open !== undefined) expect(fs.statSync(open.control).mode & 0o777).toBe(0o666);
  });
});

async function quit(control: string): Promise<void> {
  const { RawQmp } = await import("../../support/raw-qmp.js");
  const client = await RawQmp.negotiated(control);
  await client.ask({ execute: "quit" });
}

it("an empty source is copied, with a warning", async () => {
  fs.writeFileSync(at("empty.raw"), "");
  await run("qemu-img", ["create", "-q", "-f", "qcow2", at("empty.qcow2"), "0"]);
  for (const name of ["empty.raw", "empty.qcow2"]) {
    const { code, stderr } = await cowcatcher(["backup", at(name), at(`${name}.copy.raw`)]);
    expect([code, stderr]).toEqual([0, expect.stringContaining(`${at(name)}: has 0 bytes`)]);
  }
});

it("an interrupted copy says what became of its own target alone", async () => {
  for (const [target, expected] of [
    [at("b.raw"), "the unfinished file was removed"],
    ["null:", "interrupted by SIGINT\n"],
  ] as const) {
    const backup = new Process(process.execPath, [
      ...[COWCATCHER_BIN, "backup", "--json", "--rate-limit", "64K", at("disk.raw"), target],
    ]);
    await backup.line(() => true);
    backup.kill("SIGINT");
    const { code, stderr } = await backup.ended;
    expect(code).toBe(130);
    expect(stderr).toContain(expected);
    expect(stderr).not.toContain("device");
  }
});

it("an export that there is not is answered with those that there are", async () => {
  const server = await Server.start(folder, [at("disk.raw")]);
  const { code, stderr } = await cowcatcher(["info", `nbd+unix:///rooot?socket=${server.socket}`]);
  expect([code, stderr]).toEqual([1, expect.stringContaining("no export named 'rooot'")]);
  expect(stderr).toContain("(it has 'disk')");
});

it("a LUKS image is no riddle", async () => {
  fs.writeFileSync(
    at("luks.img"),
    Buffer.concat([Buffer.from("LUKS\xba\xbe\0\x01", "latin1"), Buffer.alloc(1 * MiB, 3)]),
  );
  const info = await cowcatcher(["info", at("luks.img")]);
  expect(info.stderr).toContain("encrypted (LUKS)");
  expect(info.stderr).toContain("-f raw: a copy of the ciphertext is a sound backup");
  expect((await cowcatcher(["backup", "-f", "raw", at("luks.img"), at("b.raw")])).code).toBe(0);
});

it("a file that is larger than may be written is named with its limit", async () => {
  const script = `ulimit -f 1024; node "${COWCATCHER_BIN}" backup "${at("disk.raw")}" "${at("b.raw")}"`;
  const { code, stderr } = await run("bash", ["-c", script]);
  expect(code).toBe(1);
  expect(stderr).toContain("this process may write files of 1048576 bytes at most: see ulimit -f");
  expect(stderr).toContain("qcow2");
  expect(stderr).not.toContain("free space");
});

it.runIf(process.getuid?.() === 0)(
  "room that will not do, and a source that is mounted, are told before the copy",
  async () => {
    const mountPoint = at("small");
    fs.mkdirSync(mountPoint);
    try {
      execFileSync("mount", ["-t", "tmpfs", "-o", "size=2M", "tmpfs", mountPoint], { stdio: "pipe" });
    } catch {
      return;
    }
    try {
      const dry = await cowcatcher(["backup", "--dry-run", at("disk.raw"), join(mountPoint, "b.raw")]);
      expect(dry.stderr).toMatch(/b\.raw: 2\.00 MiB are free there, and up to 8\.00 MiB are needed/);
      const real = await cowcatcher(["backup", at("disk.raw"), join(mountPoint, "b.raw")]);
      expect(real.stderr).toMatch(/warning: .*b\.raw: 2\.00 MiB are free there/);
      expect(real.code).toBe(1);
    } finally {
      execFileSync("umount", [mountPoint]);
    }
  },
);

it("a device whose file system is mounted is known by mountinfo", () => {
  const text = [
    "36 35 98:0 /mnt1 /mnt/a\\040b rw,noatime master:1 - ext3 /dev/root rw,errors=continue",
    "37 35 98:1 / /ro ro - ext4 /dev/sdb1 ro",
    "38 35 0:21 / /proc rw - proc proc rw",
  ].join("\n");
  expect(parseMounts(text)).toEqual([{ source: "/dev/root", mountPoint: "/mnt/a b" }]);
});

it("a job's id is one that QEMU takes, whatever the disk is called", () => {
  const disk = { sizeBytes: 0, format: "raw", path: undefined, dataBytes: undefined, jobCount: 4 };
  expect(jobIdOf({ ...disk, name: "root" }, new Set())).toBe("root-5");
  expect(jobIdOf({ ...disk, name: "0 a/b" }, new Set(["disk-0_a_b-5"]))).toBe("disk-0_a_b-6");
});
