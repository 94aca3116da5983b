// Each usage error: its exact line, and its exit code.
import { describe, expect, it } from "vitest";
import { runProgram } from "../../../src/cli/program.js";

interface Outcome {
  code: number;
  stdout: string;
  stderr: string;
}

async function run(args: readonly string[], environment: Record<string, string> = {}): Promise<Outcome> {
  let stdout = "";
  let stderr = "";
  const code = await runProgram(args, {
    stdout: { write: (text) => (stdout += text) },
    stderr: { write: (text) => (stderr += text) },
    environment,
  });
  return { code, stdout, stderr };
}

const LIVE = ["backup", "--control", "/run/c"];

/** [arguments, what stands after "cowcatcher: ", exit code] */
const USAGE: [string, string, number?][] = [
  ["", "COMMAND: is missing (see cowcatcher --help)"],
  ["bakup", "bakup: is not a command (did you mean backup?)"],
  ["xyz", "xyz: is not a command (see cowcatcher --help)"],
  ["-q info", "-q: is not an option (see cowcatcher --help)"],
  ["backup", "SOURCE: is missing (give SOURCE and TARGET)"],
  ["backup a.img", "TARGET: is missing (give SOURCE and TARGET)"],
  ["backup a.img b.img c.img", "c.img: is one argument too many (give SOURCE and TARGET)"],
  ["backup a.img ./a.img", "./a.img: is source and target at once (choose another target)"],
  [
    "backup --disk root a.img b.img",
    "--disk: needs --control (give the control socket of the server that has the disk open)",
  ],
  ["backup --workers x a b", "--workers: 'x' is not a number from 1 to 64"],
  ["backup -w 65 a b", "--workers: '65' is not a number from 1 to 64"],
  ["backup -w", "--workers: needs a value (see cowcatcher backup --help)"],
  [
    "backup --rate-limit fast a b",
    "--rate-limit: 'fast' is not a size (give bytes, or a number with K, M, G, T, P or E, such as 64K)",
  ],
  [
    "backup --guest-timeout soon a b",
    "--guest-timeout: 'soon' is not a duration (give seconds, or a number with ms, s or m, such as 500ms)",
  ],
  ["backup --guest-timeout 0 a b", "--guest-timeout: 0 is no time to wait (give seconds, such as 45)"],
  ["backup -f vmdk a b", "--source-format: 'vmdk' is not known (give raw or qcow2)"],
  ["backup -O vdi a b", "--target-format: 'vdi' is not known (give raw or qcow2)"],
  ["backup --on-buffer-full drop a b", "--on-buffer-full: 'drop' is not known (give spill, wait or cancel)"],
  [
    "backup --on-cbw-error x a b",
    "--on-cbw-error: 'x' is not known (give break-snapshot or break-guest-write)",
  ],
  ["backup --on-source-error x a b", "--on-source-error: 'x' is not known (give report, ignore or stop)"],
  ["backup --on-target-error x a b", "--on-target-error: 'x' is not known (give report, ignore or stop)"],
  ["backup --target-retries -1 a b", "--target-retries: '-1' is not a number from 0 to 1000"],
  [
    "backup --cluster-size 100 a b.qcow2",
    "--cluster-size: 100 is not a cluster size (give a power of two from 512 to 2M)",
  ],
  [
    "backup --cluster-size 4M a b.qcow2",
    "--cluster-size: 4194304 is not a cluster size (give a power of two from 512 to 2M)",
  ],
  [
    "backup --cluster-size 128K a b.img",
    "--cluster-size: a raw target has no clusters (choose a qcow2 target with -O qcow2)",
  ],
  [
    "backup -b base.qcow2 a b.raw",
    "--backing-file: a raw target has no backing file (choose a qcow2 target with -O qcow2)",
  ],
  ["backup -B qcow2 a b.qcow2", "--backing-format: needs --backing-file"],
  ["backup -b x -b y -B qcow2 a b.qcow2", "--backing-file: is given twice (give one)"],
  [
    "backup --control c --disk r --disk s -b x -B qcow2 r.qcow2 s.qcow2",
    "--backing-file: 1 backing file and 2 targets (give one for each TARGET, in the same order)",
  ],
  ["run", "JOB: is missing (give names of jobs, or --all)"],
  ["run --all vm1", "vm1: does not go with --all (give one of them)"],
  ["run --check --dry-run", "--check: does not go with --dry-run (give one of them)"],
  ["run -j 0 --all", "--parallel: '0' is not a number from 1 to 64"],
  [
    "backup --on-buffer-full wait --spill-dir /tmp a b",
    "--spill-dir: does not go with 'wait' (give --on-buffer-full spill)",
  ],
  [
    "backup --on-buffer-full cancel --spill-limit 1G a b",
    "--spill-limit: does not go with 'cancel' (give --on-buffer-full spill)",
  ],
  ["backup --sync all a b", "--sync: 'all' is not known (give full, top, incremental or none)"],
  ["backup --sync incremental a b", "--sync: incremental needs --bitmap (give its name)"],
  [
    "backup --sync none a b",
    "--sync: none needs --control (an image that no one writes is its own snapshot)",
  ],
  [
    "backup --control c --sync none /b.raw",
    "/b.raw: --sync none writes no target (give null: and read the snapshot's export)",
  ],
  [
    "backup --control c --sync none --on-buffer-full wait null:",
    "--on-buffer-full: 'wait' would wait for ever with --sync none (give spill or cancel)",
  ],
  [
    "backup --control c --sync none --cow-buffer-size 0 null:",
    "--cow-buffer-size: --sync none keeps old data in the buffer (give a size)",
  ],
  [
    "backup --control c --sync none --rate-limit 1M null:",
    "--rate-limit: does not go with --sync none (nothing is copied)",
  ],
  ["backup -c zstd:20 a b.qcow2", "--compress: zstd has no level 20 (give a number from 1 to 19)"],
  [
    "backup --compress=gzip a b.qcow2",
    "--compress: 'gzip' is no compression method (there are zlib and zstd, with or without a level, such as zstd:3; a file of this name is ./gzip)",
  ],
  [
    "backup -c a b.img",
    "--compress: a raw target cannot be compressed (choose a qcow2 target with -O qcow2)",
  ],
  [
    "backup -c lzo a b.qcow2",
    "--compress: 'lzo' is no compression method (there are zlib and zstd, with or without a level, such as zstd:3; a file of this name is ./lzo)",
  ],
  [
    "backup -c a b.qcow2 c.qcow2",
    "c.qcow2: is one argument too many (give SOURCE and TARGET; -c takes zlib or zstd, with a level if wanted)",
  ],
  [
    "backup -b base.qcow2 a b.qcow2",
    "--backing-format: is missing (name the backing file's format: raw or qcow2)",
  ],
  ["backup --bitmap b0 a b", "--bitmap: needs --backing-file (name the backup that this one builds on)"],
  [
    "backup --bitmap b0 --bitmap-mode never --snapshot s -b f -B raw a b",
    "--bitmap: does not go with --snapshot (a bitmap tells of the disk as it is)",
  ],
  [
    "backup --bitmap b0 nbd://h/x b.qcow2",
    "--bitmap: needs --backing-file (name the backup that this one builds on)",
  ],
  [
    "backup --bitmap b0 --bitmap-mode always -b f -B raw nbd://h/x b.qcow2",
    "--bitmap-mode: 'always' would change the bitmap, which an NBD client cannot (give never, and clear the bitmap in QEMU)",
    1,
  ],
  ["backup --bitmap b0 --sync full nbd://h/x b", "--bitmap: does not go with --sync full (leave --sync out)"],
  [
    "backup --control c --bitmap b0 b.qcow2",
    "--bitmap: dirty bitmaps do not go with --control (leave it out)",
    1,
  ],
  ["backup --bitmap-mode never a b", "--bitmap-mode: needs --bitmap"],
  [
    "backup --bitmap-mode sometimes a b",
    "--bitmap-mode: 'sometimes' is not known (give on-success, never or always)",
  ],
  ["backup --forse a b", "--forse: is not an option (did you mean --force?)"],
  ["backup nbd+unix:///x b", "nbd+unix:///x: names no socket (add ?socket=PATH)"],
  ["backup a nbd+vsock://1/x", "nbd+vsock://1/x: vsock is not supported (use nbd:// or nbd+unix://)", 1],
  [
    "backup a nbd://h/?tls-hostname=x",
    "nbd://h/?tls-hostname=x: 'tls-hostname' needs TLS (write nbds: instead of nbd:)",
  ],
  [
    "backup --log-level loud a b",
    "--log-level: 'loud' is not known (give trace, debug, info, warn, error, fatal or silent)",
  ],
  ["serve", "IMAGE: is missing (see cowcatcher serve --help)"],
  ["serve a.img", "serve: does not know where to listen (give --socket PATH or --port N)"],
  ["serve --socket s --port 1 a.img", "--port: does not go with --socket"],
  ["serve --socket s --bind ::1 a.img", "--bind: needs --port"],
  ["serve --port 1 --socket-mode 600 a.img", "--socket-mode: needs --socket"],
  [
    "serve --socket s --socket-mode 888 a.img",
    "--socket-mode: '888' is not a mode (give three octal digits, such as 660)",
  ],
  [
    "serve --socket s --tls on a.img",
    "--tls: 'on' would leave it to the client whether to encrypt (give require or off)",
  ],
  [
    "serve --socket s --tls require a.img",
    "--tls: has nothing to identify the server by (give --tls-certificates DIR or --tls-psk FILE)",
  ],
  ["serve --socket s --tls off --tls-psk f a.img", "--tls-psk: does not go with --tls off"],
  [
    "serve --socket s --tls-certificates d --tls-psk f a.img",
    "--tls-psk: does not go with --tls-certificates (clients are known by one or the other)",
  ],
  [
    "serve --socket s --tls-verify-peer a.img",
    "--tls-verify-peer: needs --tls-certificates (it checks clients by ca-cert.pem there)",
  ],
  [
    "serve --socket s --bitmap b a.qcow2",
    "--bitmap: needs --read-only (guest writes are not recorded in bitmaps)",
  ],
  [`serve --socket s --name ${"x".repeat(4097)} a.img`, "IMAGE: an export's name has more than 4096 bytes"],
  [
    "serve --port 1 --metrics 9101 a.img",
    "--metrics: '9101' is no address (give ADDR:PORT, such as 127.0.0.1:9101)",
  ],
  ["serve --port 65536 a.img", "--port: '65536' is not a number from 0 to 65535"],
  ["serve --socket s a.img b.img", "a.img: has no name (with several images, give each as IMAGE=NAME)"],
  ["serve --socket s a.img=x b.img=x", "IMAGE: the name 'x' is given twice"],
  [
    "serve --socket s --name x a.img=y",
    "--name: is for a single image (give each image a name as IMAGE=NAME)",
  ],
  [
    "serve --socket s --name x a.img b.img",
    "--name: is for a single image (give each image a name as IMAGE=NAME)",
  ],
  ["serve --socket s --max-connections 0 a", "--max-connections: '0' is not a number from 1 to 1024"],
  [
    "serve --socket s nbds://a:b:c/x",
    "nbds://a:b:c/x: is not an NBD URI (write nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH)",
  ],
  ["create nbd://h/x 1M", "nbd://h/x: an NBD export is not possible here (give the path of an image)", 1],
  ["jobs", "--control: is missing (see cowcatcher jobs --help)"],
  ["jobs stop x --control c", "jobs: 'stop' is not known (give cancel, pause, resume or set-speed)"],
  ["jobs cancel --control c", "ID: is missing (cowcatcher jobs lists the jobs)"],
  ["jobs cancel x 5 --control c", "5: is one argument too many (cancel takes an ID alone)"],
  ["jobs set-speed x --control c", "SIZE: is missing (give bytes a second, or 0 for no limit)"],
  ["restore a", "TARGET: is missing (see cowcatcher restore --help)"],
  ["restore a b c", "restore: too many arguments (see cowcatcher restore --help)"],
  ["info", "IMAGE: is missing (see cowcatcher info --help)"],
  ["info a b", "info: too many arguments (see cowcatcher info --help)"],
  [
    "map -s x a",
    "--start-offset: 'x' is not a size (give bytes, or a number with K, M, G, T, P or E, such as 64K)",
  ],
  ["create", "IMAGE: is missing (see cowcatcher create --help)"],
  // compare and check have QEMU's exit codes: 2 would be a corrupt image to a script that calls check.
  ["compare a", "B: is missing (see cowcatcher compare --help)", 2],
  ["compare nbd+unix:///a b", "nbd+unix:///a: names no socket (add ?socket=PATH)", 2],
  [
    "check nbd://h/a",
    "nbd://h/a: this image format does not support checks (check the image where it is stored)",
    63,
  ],
  ["check", "IMAGE: is missing (see cowcatcher check --help)", 1],
  ["check -f vmdk a", "--format: 'vmdk' is not known (give raw or qcow2)", 1],
];

describe("usage errors", () => {
  it.each(USAGE)("cowcatcher %s", async (commandLine, message, code = 2) => {
    const outcome = await run(commandLine.split(" ").filter((word) => word !== ""));
    expect(outcome).toEqual({ code, stdout: "", stderr: `cowcatcher: ${message}\n` });
  });

  it.each([
    [[...LIVE], "TARGET: is missing (give one for each --disk)"],
    [[...LIVE, "a", "b"], "--disk: is missing for 2 targets (give one for each TARGET)"],
    [
      [...LIVE, "--disk", "x", "a", "b"],
      "TARGET: 1 disk and 2 targets (give a TARGET for each --disk, in the same order)",
    ],
    [[...LIVE, "--disk", "x", "--disk", "x", "a", "b"], "--disk: 'x' is given twice"],
    [[...LIVE, "--disk", "x", "--disk", "y", "/a", "/./a"], "TARGET: '/a' is given twice"],
    [
      [...LIVE, "-f", "raw", "a"],
      "--source-format: does not go with --control (the server has opened the source)",
    ],
  ])("live backup %j", async (args, message) => {
    expect(await run(args)).toEqual({ code: 2, stdout: "", stderr: `cowcatcher: ${message}\n` });
  });

  it("prints the error as a JSON object as well with --json", async () => {
    const { code, stdout, stderr } = await run(["backup", "--json", "-w", "0", "a", "b"]);
    expect(code).toBe(2);
    expect(stderr).toBe("cowcatcher: --workers: '0' is not a number from 1 to 64\n");
    expect(stdout.endsWith("}\n")).toBe(true);
    expect(JSON.parse(stdout)).toEqual({
      message_type: "error",
      time: expect.stringMatching(/Z$/) as string,
      error: {
        code: "USAGE",
        object: "--workers",
        problem: "'0' is not a number from 1 to 64",
        hint: null,
        offset: null,
        errno: null,
        message: "--workers: '0' is not a number from 1 to 64",
      },
    });
  });

  it("does not take a file called --json for the option", async () => {
    const { stdout } = await run(["info", "--", "--json", "b"]);
    expect(stdout).toBe("");
  });
});

describe("help and version", () => {
  it("lists the commands", async () => {
    const { code, stdout, stderr } = await run(["--help"]);
    expect(code).toBe(0);
    expect(stderr).toBe("");
    for (const name of ["backup", "serve", "jobs", "restore", "info", "map", "check", "compare", "create"]) {
      expect(stdout).toMatch(new RegExp(`^  ${name} `, "m"));
    }
  });

  it.each(["backup", "serve", "jobs", "restore", "info", "map", "check", "compare", "create"])(
    "%s --help has options, exit codes and two or three examples",
    async (name) => {
      const { code, stdout, stderr } = await run([name, "--help"]);
      expect(code).toBe(0);
      expect(stderr).toBe("");
      for (const option of [
        "--json",
        "--log-file",
        "--log-level",
        "--quiet",
        "--progress",
        "--no-progress",
      ]) {
        expect(stdout).toContain(option);
      }
      expect(stdout).toMatch(/\nExit codes:\n( {2}\d+ +\S.*\n){3,}/);
      const examples = stdout.slice(stdout.indexOf("Examples:")).trimEnd().split("\n").slice(1);
      expect(examples.length).toBeGreaterThanOrEqual(2);
      expect(examples.length).toBeLessThanOrEqual(3);
      for (const example of examples) expect(example).toMatch(new RegExp(`^  cowcatcher ${name}\\b`));
    },
  );

  it("prints the version of package.json", async () => {
    expect(await run(["--version"])).toEqual({ code: 0, stdout: "0.1.0\n", stderr: "" });
  });
});
