import { execFile, execFileSync } from "node:child_process";
import * as fs from "node:fs";
import { tmpdir } from "node:os";
import * as path from "node:path";
import { promisify } from "node:util";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { acquireImageLock, releaseImageLock } from "../../../src/block/file/locks.js";
import { libc } from "../../../src/native/libc.js";

const run = promisify(execFile);

let folder: string;
let fds: number[];
let servers: number[];

beforeEach(() => {
  folder = fs.mkdtempSync(path.join(tmpdir(), "cowcatcher-locks-"));
  fds = [];
  servers = [];
});

afterEach(() => {
  for (const fd of fds) fs.closeSync(fd);
  for (const pid of servers) process.kill(pid, "SIGKILL");
  fs.rmSync(folder, { recursive: true, force: true });
});

function create(format: string): string {
  const file = path.join(folder, `disk.${format}`);
  execFileSync("qemu-img", ["create", "-q", "-f", format, file, "1M"]);
  return file;
}

function open(file: string, access: "r" | "r+"): number {
  const fd = fs.openSync(file, access);
  fds.push(fd);
  return fd;
}

/** Returns when qemu-nbd has the image open: with --fork it goes to the background only then. */
function serveByQemu(file: string, format: string, ...options: string[]): void {
  const pidFile = path.join(folder, `pid${servers.length}`);
  const socket = path.join(folder, `socket${servers.length}`);
  const common = ["--fork", "--persistent", "-f", format, "-k", socket, "--pid-file", pidFile];
  execFileSync("qemu-nbd", [...common, ...options, file], { stdio: "ignore" });
  servers.push(Number(fs.readFileSync(pidFile, "utf8")));
}

async function failureOf(command: string, ...args: string[]): Promise<string> {
  try {
    const { stdout, stderr } = await run(command, args);
    return `succeeded: ${stdout}${stderr}`;
  } catch (error) {
    return (error as { stderr: string }).stderr;
  }
}

describe.runIf(libc !== null).each(["raw", "qcow2"])("our locks and QEMU's on a %s image", (format) => {
  it("keep QEMU from what our writer does not share", async () => {
    const file = create(format);
    acquireImageLock(open(file, "r+"), file, { write: true, resize: format === "qcow2" });
    expect(await failureOf("qemu-io", "-f", format, "-c", "write 0 4k", file)).toContain(
      'Failed to get "write" lock',
    );
    if (format === "qcow2") {
      expect(await failureOf("qemu-img", "info", file)).toContain('Failed to get shared "write" lock');
    }
    await run("qemu-img", ["info", "-U", file]);
  });

  it("refuse our writer and our reader while qemu-nbd serves the image for writing", () => {
    const file = create(format);
    serveByQemu(file, format);
    const shared = `${file}: cannot get the shared 'write' lock (byte 101) (is another process using the image?)`;
    const own = `${file}: cannot get the 'write' lock (byte 201) (is another process using the image?)`;
    expect(() => acquireImageLock(open(file, "r"), file, { write: false })).toThrow(shared);
    expect(() => acquireImageLock(open(file, "r+"), file, { write: true })).toThrow(
      format === "qcow2" ? own : shared,
    );
  });

  it("refuse our writer, but not our reader, while QEMU reads a qcow2 image", () => {
    const file = create(format);
    serveByQemu(file, format, "--read-only");
    acquireImageLock(open(file, "r"), file, { write: false });
    if (format !== "qcow2") return;
    expect(() => acquireImageLock(open(file, "r+"), file, { write: true })).toThrow(
      "cannot get the 'write' lock",
    );
  });

  it("let QEMU read, but not write, beside our readers", async () => {
    const file = create(format);
    acquireImageLock(open(file, "r"), file, { write: false });
    acquireImageLock(open(file, "r"), file, { write: false });
    await run("qemu-img", ["convert", "-f", format, "-O", "raw", file, path.join(folder, "copy")]);
    expect(await failureOf("qemu-io", "-f", format, "-c", "write 0 4k", file)).toContain(
      'Failed to get "write" lock',
    );
  });

  it("end with a release, with closing, and with a refusal", async () => {
    const file = create(format);
    const writer = open(file, "r+");
    acquireImageLock(writer, file, { write: true });
    const refused = open(file, "r+");
    expect(() => acquireImageLock(refused, file, { write: true })).toThrow(
      expect.objectContaining({ code: "LOCKED", object: file }),
    );
    releaseImageLock(writer);
    // The refused opener must have left nothing behind either.
    await run("qemu-io", ["-f", format, "-c", "write 0 4k", file]);

    acquireImageLock(writer, file, { write: true });
    fds = fds.filter((fd) => fd !== writer);
    fs.closeSync(writer);
    await run("qemu-io", ["-f", format, "-c", "write 0 4k", file]);
  });

  it("can be widened by their holder", () => {
    const file = create(format);
    const fd = open(file, "r+");
    acquireImageLock(fd, file, { write: true });
    acquireImageLock(fd, file, { write: true, resize: true });
    const own = fs.readFileSync("/proc/locks", "utf8").split("\n");
    const inode = `:${fs.fstatSync(fd).ino} `;
    const ranges = own
      .filter((line) => line.includes(inode))
      .map((line) => line.split(/\s+/).slice(-2).join("-"));
    expect(ranges.sort()).toEqual(["100-101", "103-103", "201-201", "203-203"]);
  });
});
