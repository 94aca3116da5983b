// The command line at its edges, as a process of its own: what a script, a full disk, a closed pipe or a terminal that
// goes does to it.
import { spawn } from "node:child_process";
import { once } from "node:events";
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { COWCATCHER_BIN, cowcatcher, run } from "../../support/cli.js";

let folder: string;

beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), "cli-edges-"));
  writeFileSync(join(folder, "disk.img"), Buffer.alloc(4 << 20, 7));
});

afterAll(() => {
  rmSync(folder, { recursive: true, force: true });
});

const ours = (...args: string[]) => cowcatcher(args, { cwd: folder });

describe("a full or broken output", () => {
  /** stdout is a device on which every write fails with ENOSPC. */
  async function ontoFullDisk(...args: string[]): Promise<{ code: number; stderr: string }> {
    const child = spawn(process.execPath, [COWCATCHER_BIN, ...args], {
      cwd: folder,
      stdio: ["ignore", openSync("/dev/full", "w"), "pipe"],
    });
    let stderr = "";
    child.stderr?.setEncoding("utf8").on("data", (text: string) => (stderr += text));
    const [code] = (await once(child, "close")) as [number];
    return { code, stderr };
  }

  it("a result that cannot be written is a failure", async () => {
    const { code, stderr } = await ontoFullDisk("info", "--json", "disk.img");
    expect(stderr).toBe(
      "cowcatcher: standard output: cannot write: no space left on the device (free space there, or choose another place)\n",
    );
    expect(code).toBe(1);
  });

  it("the command's own failure comes before that of its output", async () => {
    const { code, stderr } = await ontoFullDisk("compare", "--json", "disk.img", "missing.img");
    expect(stderr).toMatch(/^cowcatcher: missing\.img: cannot open/);
    expect(code).toBe(2);
  });

  it("a log that cannot be written ends nothing", async () => {
    const { code, stderr } = await ours(
      ...["info", "--log-level", "debug", "--log-file", "/dev/full", "missing.img"],
    );
    expect(stderr).toBe("cowcatcher: missing.img: cannot open: no such file or directory\n");
    expect(code).toBe(1);
  });

  it("a reader that has seen enough is no failure", async () => {
    const { code, stdout, stderr } = await run(
      "bash",
      ["-c", `set -o pipefail; "$0" "$1" map --json disk.img | true`, process.execPath, COWCATCHER_BIN],
      { cwd: folder },
    );
    expect({ code, stdout, stderr }).toEqual({ code: 0, stdout: "", stderr: "" });
  });
});

describe("options of a live backup without --control", () => {
  it.each([
    ["--cow-buffer-size", "1M"],
    ["--on-buffer-full", "wait"],
    ["--spill-dir", "."],
    ["--spill-limit", "1M"],
    ["--guest-timeout", "5"],
    ["--on-cbw-error", "break-guest-write"],
  ])("%s is refused by its name", async (option, value) => {
    const { code, stderr } = await ours("backup", option, value, "disk.img", "refused.img");
    expect(stderr).toBe(
      `cowcatcher: ${option}: needs --control (no guest writes to SOURCE, so there is no buffer)\n`,
    );
    expect(code).toBe(2);
    expect(existsSync(join(folder, "refused.img"))).toBe(false);
  });
});

describe("names", () => {
  it.each(["null:x", "file:copy.img", "json:{}", "iscsi:host/lun"])(
    "%s is not taken for a new file's name",
    async (target) => {
      const before = readdirSync(folder);
      const { code, stderr } = await ours("backup", "disk.img", target);
      expect(stderr).toMatch(/: is an address of a kind that is not known here \(.*\)\n$/);
      expect(code).toBe(2);
      expect(readdirSync(folder)).toEqual(before);
    },
  );

  it.each(["with space.img", "with:colon.img", "-dash.img", "new\nline.img", "ünï-日本.img", "a=b,c.img"])(
    "'%s' is a file like any other",
    async (name) => {
      const made = await ours("backup", "disk.img", "--", name);
      expect(made.code).toBe(0);
      expect(existsSync(join(folder, name))).toBe(true);
      const same = await ours("compare", "disk.img", "--", name);
      expect(same.code).toBe(0);
    },
  );

  it("a file that is there may be called as an address", async () => {
    writeFileSync(join(folder, "nbd:old.img"), Buffer.alloc(4096, 1));
    expect(await ours("backup", "nbd:old.img", "./nbd:new.img")).toMatchObject({ code: 0, stderr: "" });
    expect(existsSync(join(folder, "nbd:new.img"))).toBe(true);
  });

  it("an empty disk and one of an odd size are copied as they are", async () => {
    writeFileSync(join(folder, "empty.img"), "");
    writeFileSync(join(folder, "odd.img"), Buffer.alloc(1000, 3));
    for (const name of ["empty", "odd"]) {
      for (const format of ["raw", "qcow2"]) {
        const copy = `${name}-copy.${format}`;
        const { code, stderr } = await ours("backup", "--verify", `${name}.img`, copy);
        expect(code).toBe(0);
        expect(stderr).toMatch(name === "empty" ? /^cowcatcher: .*empty\.img: has 0 bytes.*\n$/ : /^$/);
        expect(
          await run("qemu-img", ["compare", "-f", "raw", "-F", format, `${name}.img`, copy], { cwd: folder }),
        ).toMatchObject({ code: 0 });
      }
    }
  });
});

describe("empty values", () => {
  it.each([
    [["jobs", "--control", ""], "--control"],
    [["backup", "--control", "", "x.img"], "--control"],
    [["backup", "--control", "c", "--spill-dir", "", "x.img"], "--spill-dir"],
    [["backup", "--control", "c", "--disk", "", "x.img"], "--disk"],
    [["serve", "--socket", "", "disk.img"], "--socket"],
    [["serve", "--socket", "s", "--name", "", "disk.img"], "--name"],
    [["info", "--log-file", "", "disk.img"], "--log-file"],
  ])("%s", async (args, option) => {
    expect(await ours(...args)).toEqual({ code: 2, stdout: "", stderr: `cowcatcher: ${option}: is empty\n` });
  });
});

describe("serve", () => {
  it("refuses a buffer that no job could get", async () => {
    const { code, stderr } = await ours("serve", "--socket", "s", "--cow-buffer-size", "8G", "disk.img");
    expect(stderr).toBe(
      "cowcatcher: --cow-buffer-size: 8G is more than a buffer can have (give 4G at most)\n",
    );
    expect(code).toBe(2);
  });

  it("refuses one file as two disks, also by another name", async () => {
    symlinkSync("disk.img", join(folder, "link.img"));
    const { code, stderr } = await ours("serve", "--socket", "s", "disk.img=a", "link.img=b");
    expect(stderr).toBe(
      "cowcatcher: link.img: is 'a' and 'b' at once (serve it once, or with --read-only)\n",
    );
    expect(code).toBe(2);
  });

  it("refuses one path for both sockets", async () => {
    const { code, stderr } = await ours("serve", "--socket", "s", "--control", "./s", "disk.img");
    expect(stderr).toBe("cowcatcher: --control: is the path of --socket (give another path)\n");
    expect(code).toBe(2);
  });

  it("says of a folder that is not there that it is not", async () => {
    const { code, stderr } = await ours("serve", "--socket", "none/s", "disk.img");
    expect(stderr).toBe("cowcatcher: none/s: the folder none does not exist (create it first)\n");
    expect(code).toBe(1);
  });

  it.each([
    ["8.8.8.8", "8.8.8.8:0: cannot listen on: this machine does not have the address"],
    ["no.invalid", "no.invalid:0: cannot listen on: no such host"],
  ])("says why it cannot listen at %s", async (address, message) => {
    const { code, stderr } = await ours("serve", "--port", "0", "--bind", address, "disk.img");
    expect(stderr).toBe(`cowcatcher: ${message}\n`);
    expect(code).toBe(1);
  });
});

describe("a terminal that goes", () => {
  it("ends a backup as SIGINT does, with nothing left behind", async () => {
    const place = join(folder, "hangup");
    mkdirSync(place);
    const child = spawn(
      process.execPath,
      [COWCATCHER_BIN, "backup", "--json", "--rate-limit", "16K", "disk.img", join(place, "copy.img")],
      { cwd: folder, stdio: ["ignore", "pipe", "pipe"] },
    );
    let stderr = "";
    child.stderr.setEncoding("utf8").on("data", (text: string) => (stderr += text));
    await once(child.stdout, "data");
    expect(readdirSync(place)).toHaveLength(1);
    // The kernel and the shell may each send one.
    child.kill("SIGHUP");
    child.kill("SIGHUP");
    const [code, signal] = (await once(child, "close")) as [number | null, string | null];
    expect({ code, signal }).toEqual({ code: 129, signal: null });
    expect(stderr).toMatch(/^cowcatcher: backup: interrupted by SIGHUP \(.*\)\n$/);
    expect(readdirSync(place)).toEqual([]);
  });
});
