// What TARGET and SOURCE mean by their names: - , extensions, devices, folders of devices.
import { execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import * as fs from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { sampled } from "../../support/campaign.js";
import { COWCATCHER_BIN, cowcatcher, run } from "../../support/cli.js";
import { KiB, MiB } from "../../../src/units.js";

const folder = fs.mkdtempSync(join(tmpdir(), "cowcatcher-targets-"));
const source = join(folder, "source.raw");
/** Data, a long hole, data, and a hole at the end, over several chunks; not a multiple of anything. */
const content = Buffer.alloc(21 * MiB + 512);

beforeAll(() => {
  for (let at = 0; at < 3 * MiB; at++) content[at] = (at * 31 + (at >> 8)) & 0xff;
  for (let at = 17 * MiB + 4 * KiB; at < 18 * MiB; at++) content[at] = (at * 7 + (at >> 9)) & 0xff;
  const fd = fs.openSync(source, "w");
  fs.ftruncateSync(fd, content.length);
  fs.writeSync(fd, content, 0, 3 * MiB, 0);
  fs.writeSync(fd, content, 17 * MiB, 1 * MiB, 17 * MiB);
  fs.closeSync(fd);
});

afterAll(() => {
  fs.rmSync(folder, { recursive: true, force: true });
});

const at = (name: string): string => join(folder, name);
const digest = (data: Buffer): string => createHash("sha256").update(data).digest("hex");
const shell = (command: string): ReturnType<typeof run> =>
  run("bash", ["-c", `set -o pipefail; ${command}`], { cwd: folder, env: { CC: COWCATCHER_BIN } });
const CC = 'node "$CC"';

describe("- as TARGET", () => {
  it("is the disk on standard output, in order, and nothing else", async () => {
    const result = await shell(`${CC} backup --json source.raw - | sha256sum`);
    expect(result.code).toBe(0);
    expect(result.stdout.split(" ")[0]).toBe(digest(content));
    expect(result.stderr).toContain('"message_type":"summary"');
    expect(fs.existsSync(at("-"))).toBe(false);
  });

  it("takes a pipe whose reader is slow, a file, and a rate limit", async () => {
    const slow = await shell(`${CC} restore -q source.raw - | (sleep 0.5; dd bs=7k status=none) | sha256sum`);
    expect(slow.stdout.split(" ")[0]).toBe(digest(content));
    const file = await shell(`${CC} backup --rate-limit 20M -w 4 source.raw - > out.raw`);
    expect(file).toMatchObject({ code: 0, stdout: "" });
    expect(digest(fs.readFileSync(at("out.raw")))).toBe(digest(content));
  });

  it("gives the disk of a qcow2 image, of a backing chain, and of an export", async () => {
    await cowcatcher(["backup", "-c", source, at("base.qcow2")]);
    await run("qemu-img", ["create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", at("over.qcow2")]);
    await run("qemu-io", ["-c", "write -P 9 5M 64k", at("over.qcow2")]);
    const expected = Buffer.from(content).fill(9, 5 * MiB, 5 * MiB + 64 * KiB);
    const chain = await shell(`${CC} restore over.qcow2 - | sha256sum`);
    expect(chain.stdout.split(" ")[0]).toBe(digest(expected));
    const nbd = await shell(
      `nbdkit -U - file source.raw --run '${CC} backup -q "nbd+unix:///?socket=$unixsocket" - | sha256sum'`,
    );
    expect(nbd.stdout.split(" ")[0]).toBe(digest(content));
  });

  it("ends when its reader does, at once and with a reason", async () => {
    const result = await shell(`${CC} backup source.raw - | head -c 100 > /dev/null`);
    expect(result.code).toBe(1);
    expect(result.stderr).toContain("cowcatcher: standard output: its reader has ended");
  });

  it.each([
    ["backup -O qcow2 source.raw -", "takes a raw stream alone"],
    ["backup --verify source.raw -", "--verify: - cannot be read back"],
    ["backup --dry-run source.raw -", "--dry-run: - stores nothing"],
    ["backup --control none.ctl -", "is this command's standard output, and the server writes the target"],
  ])("is refused in %s", async (command, message) => {
    const result = await shell(`${CC} ${command} | cat`);
    expect(result).toMatchObject({ code: 2, stdout: "" });
    expect(result.stderr).toContain(message);
  });

  it("does not write over the source that standard output was redirected to", async () => {
    fs.copyFileSync(source, at("same.raw"));
    const result = await shell(`${CC} backup same.raw - 1<> same.raw`);
    expect(result.code).toBe(2);
    expect(digest(fs.readFileSync(at("same.raw")))).toBe(digest(content));
  });
});

describe("- as SOURCE", () => {
  it("is the file that standard input is redirected from", async () => {
    const result = await shell(
      `${CC} backup - from-stdin.qcow2 < source.raw && qemu-img compare source.raw from-stdin.qcow2`,
    );
    expect(result.code).toBe(0);
  });

  it("is refused where standard input is a pipe", async () => {
    const result = await shell(`cat source.raw | ${CC} restore - piped.raw`);
    expect(result.code).toBe(2);
    expect(result.stderr).toContain("./-");
    expect(fs.existsSync(at("piped.raw"))).toBe(false);
  });
});

it.each([
  "info -",
  "map -",
  "check -",
  "compare - source.raw",
  "create - 1M",
  "serve --socket s.sock -",
  "serve --socket - source.raw",
  "serve --socket s.sock --control - source.raw",
  "jobs --control -",
  "backup --log-file - source.raw x.raw",
  "backup -b - -B raw source.raw x.qcow2",
  "bench --target -",
])("- is no file's name in %s", async (command) => {
  const result = await shell(`${CC} ${command}`);
  expect(result.code).not.toBe(0);
  expect(result.stderr).toContain("./-");
  expect(fs.existsSync(at("-"))).toBe(false);
});

it.each(sampled(["vmdk", "vhd", "vhdx", "VDI", "iso", "gz", "qed", "zst"], 3))(
  "a name that ends in .%s is no raw or qcow2 image without -O",
  async (extension) => {
    for (const command of ["backup source.raw", "restore source.raw", "backup --dry-run source.raw"]) {
      const result = await shell(`${CC} ${command} x.${extension}`);
      expect(result.code).toBe(2);
      expect(result.stderr).toContain(`.${extension.toLowerCase()} means a format that is not written here`);
    }
    const create = await shell(`${CC} create x.${extension} 1M`);
    expect(create.code).toBe(2);
    expect(create.stderr).toContain("-f raw");
    expect(fs.existsSync(at(`x.${extension}`))).toBe(false);
    expect((await shell(`${CC} backup -O raw source.raw x.${extension}`)).code).toBe(0);
  },
);

it.each(["restore --force source.raw /dev/nope", "backup source.raw /dev/vg/nope", "create /dev/nope 1M"])(
  "%s makes no file among the devices",
  async (command) => {
    const result = await shell(`${CC} ${command}`);
    expect(result.code).toBe(1);
    expect(result.stderr).toMatch(/^cowcatcher: \/dev\/(vg\/)?nope: no such device/);
    expect(fs.existsSync("/dev/nope")).toBe(false);
  },
);

const deviceFile = at("device.raw");
const device = attachLoopDevice();

function attachLoopDevice(): string | null {
  fs.writeFileSync(deviceFile, "");
  fs.truncateSync(deviceFile, 32 * MiB);
  try {
    return execFileSync("losetup", ["--find", "--show", deviceFile], {
      encoding: "utf8",
      stdio: "pipe",
    }).trim();
  } catch {
    return null;
  }
}

afterAll(() => {
  if (device !== null) execFileSync("losetup", ["--detach", device]);
});

describe.runIf(device !== null)("a device as TARGET", () => {
  const path = device ?? "";

  it.each(sampled(["restore", "backup"], 2))(
    "gets the disk itself by %s, of a qcow2 source, too",
    async (command) => {
      await cowcatcher(["create", at("disk.qcow2"), "4M"]);
      await run("qemu-io", ["-c", "write -P 5 0 1M", at("disk.qcow2")]);
      expect((await cowcatcher([command, "--force", at("disk.qcow2"), path])).code).toBe(0);
      execFileSync("sync");
      expect(fs.readFileSync(deviceFile).subarray(0, 1 * MiB)).toEqual(Buffer.alloc(1 * MiB, 5));
      const compressed = await cowcatcher(["backup", "--force", "-c", at("disk.qcow2"), path]);
      expect(compressed.code).toBe(2);
      const container = await cowcatcher([command, "--force", "-O", "qcow2", at("disk.qcow2"), path]);
      expect(container.code).toBe(0);
      expect((await cowcatcher(["info", "--json", path])).stdout).toContain('"format": "qcow2"');
    },
  );

  it("that is set read-only is refused before anything is written or served", async () => {
    execFileSync("blockdev", ["--setro", path]);
    try {
      for (const args of [
        ["restore", "--force", source, path],
        ["backup", "--force", "--dry-run", source, path],
        ["serve", "--socket", at("ro.sock"), "-f", "raw", path],
      ]) {
        const result = await cowcatcher(args);
        expect(result.code).toBe(1);
        expect(result.stderr).toContain(`cowcatcher: ${path}: the device is set read-only`);
      }
      expect((await cowcatcher(["info", path])).code).toBe(0);
    } finally {
      execFileSync("blockdev", ["--setrw", path]);
    }
  });
});
