// Job files: what is read, and for what is wrong the line, the column and the word that was meant.
import { readFileSync } from "node:fs";
import { chmodSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Validator, type Schema } from "@cfworker/json-schema";
import { parse } from "yaml";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { checkJobArguments } from "../../../src/cli/options/job-arguments.js";
import { loadJobs } from "../../../src/run/file/load.js";
import { faultLine, jobFileSchema, readJobFile } from "../../../src/run/file/parse.js";
import type { Job } from "../../../src/run/job.js";

let folder: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "cowcatcher-jobs-"));
});
afterEach(() => {
  rmSync(folder, { recursive: true, force: true });
});

const write = (name: string, text: string): void => writeFileSync(join(folder, name), text, { mode: 0o600 });
const load = () => loadJobs(folder, checkJobArguments);
const faults = (text: string): string[] => readJobFile("f.yaml", text).faults.map(faultLine);

async function jobsOf(text: string): Promise<Job[]> {
  write("a.yaml", text);
  const { jobs, faults: wrong } = await load();
  expect(wrong.map(faultLine)).toEqual([]);
  return jobs;
}

describe("what is wrong by itself", () => {
  it.each([
    ["jobs: {a: {imag: x}}", "1:12: jobs.a: 'imag' is not known (did you mean 'image'?)"],
    ["job: {}", "1:1: 'job' is not known (did you mean 'jobs'?)"],
    ["jobs:\n  a:\n    levle: full", "3:5: jobs.a: 'levle' is not known (did you mean 'level'?)"],
    ["jobs:\n  a:\n    level: ful", "3:12: jobs.a.level: 'ful' is not known (did you mean 'full'?)"],
    ["jobs:\n  a:\n    keep: {daly: 3}", "3:12: jobs.a.keep: 'daly' is not known (did you mean 'daily'?)"],
    ["jobs:\n  a:\n    keep: {daily: -1}", "3:19: jobs.a.keep.daily: '-1' is not a number from 0 to 1000000"],
    ["jobs:\n  a:\n    keep: 7", "3:11: jobs.a.keep: '7' is no mapping of keys to values"],
    ["jobs:\n  a:\n    retries: many", "3:14: jobs.a.retries: 'many' is not a number from 0 to 100"],
    [
      "jobs:\n  a:\n    full-every: soon",
      "3:17: jobs.a.full-every: 'soon' is not a duration (give seconds, or a number with ms, s, m, h, d or w, such as 7d)",
    ],
    ["jobs:\n  a:\n    prune: yes", "3:12: jobs.a.prune: 'yes' is neither true nor false"],
    [
      "jobs:\n  a:\n    verify: 0%",
      "3:13: jobs.a.verify: '0%' is no share (give true, false, or more than 0% and up to 100%)",
    ],
    [
      "jobs:\n  a:\n    window: 25:00-06:00",
      "3:13: jobs.a.window: '25:00-06:00' is no part of a day (give two different times from 00:00 to 24:00, such as 22:00-06:00)",
    ],
    [
      "jobs:\n  a:\n    target: /b/x.qcow2",
      "3:13: jobs.a.target: has no {date} (each backup is a file of its own, such as /backup/{group}/{disk}-{date}.qcow2)",
    ],
    [
      'jobs:\n  a:\n    target: "/b/{date}/{disk}.qcow2"',
      "3:13: jobs.a.target: {date} stands in a folder's name (all backups of a disk are in one folder: put it into the file's name)",
    ],
    [
      'jobs:\n  a:\n    target: "/b/{vm}-{date}"',
      "3:13: jobs.a.target: {vm} stands for nothing (there are {group}, {disk} and {date})",
    ],
    ["jobs:\n  a:\n    image:", "3:5: jobs.a.image: has no value"],
    [
      "jobs:\n  a:\n    ping: ftp://x",
      "3:11: jobs.a.ping: is no address of a web server (give http://… or https://…)",
    ],
    [
      "jobs:\n  a:\n    ping: {end: 'http://x'}",
      "3:12: jobs.a.ping: 'end' is not known (there are start, success, fail)",
    ],
    [
      "jobs:\n  a:\n    rate-limit: 50M",
      "3:5: jobs.a: 'rate-limit' is not known (it is an option of `backup`: give options: {rate-limit: …})",
    ],
    [
      "defaults:\n  prune-backups: keep-daily=7",
      "2:3: defaults: 'prune-backups' is not known (give 'keep', such as keep: {daily: 7, weekly: 4})",
    ],
    ["defaults:\n  image: x", "2:3: defaults: 'image' is not known"],
    ["jobs:\n  a b: {}", "2:3: jobs: 'a b' is no name (it must fit ^[A-Za-z0-9][A-Za-z0-9._+-]{0,99}$)"],
    [
      "jobs:\n  a: {level: full, level: auto}",
      "2:20: jobs.a: 'level' is given twice (leave one of them out)",
    ],
    [
      'jobs: {a: {image: /x, target: "/t/{date}"',
      "1:42: Flow map in block collection must be sufficiently indented and end with a }",
    ],
    ["jobs:\n  a:\n    time-limit: 0s", "3:17: jobs.a.time-limit: is no time at all (give more than 0)"],
    [
      "jobs:\n  a:\n    mail: [a b]",
      "3:12: jobs.a.mail[0]: 'a b' is no address (give one, or a list: [root, admin@example.org])",
    ],
    ["defaults:\n  key-file: key", "2:13: defaults.key-file: 'key' is not absolute (begin it with /)"],
    ["jobs:\n\ta: 1", "2:1: Tabs are not allowed as indentation (indent with spaces)"],
    ["", "1:1: has no job (see docs/jobs.md)"],
    ["jobs: *nothing", "1:7: jobs: *nothing names no anchor above it"],
  ])("%j", (text, line) => {
    expect(faults(text)).toEqual([`f.yaml:${line}`]);
  });

  it("is all told, in the order of the file, and other jobs are read", () => {
    const { jobs, faults: wrong } = readJobFile(
      "f",
      "jobs:\n  a: {levl: x, retries: -1}\n  b: {level: full}\n",
    );
    expect(wrong.map(({ line, column }) => [line, column])).toEqual([
      [2, 7],
      [2, 25],
    ]);
    expect(jobs.map(({ name, isWhole }) => [name, isWhole])).toEqual([
      ["a", false],
      ["b", true],
    ]);
  });

  it("is no bomb: aliases of aliases are read once for each place", () => {
    const lists = Array.from({ length: 30 }, (_, n) => `x${n}: &x${n} [*x${n - 1}, *x${n - 1}]`).slice(1);
    expect(faults(`x0: &x0 [a]\n${lists.join("\n")}\njobs: *x29\n`).at(-1)).toContain("no mapping of keys");
  });
});

describe("what does not go together", () => {
  const target = "    target: /b/{group}/{disk}-{date}.qcow2\n";
  it.each([
    [`jobs:\n  a:\n${target}`, "3:5: jobs.a: names no source (give image, images, control, qmp or libvirt)"],
    [
      `jobs:\n  a:\n    image: /x\n    qmp: /y\n${target}`,
      "4:5: jobs.a.qmp: does not go with 'image' (give one of them)",
    ],
    [
      "jobs:\n  a:\n    image: /x\n",
      "3:5: jobs.a: says nothing of where the backup goes (give 'target' or 'repository')",
    ],
    [
      `jobs:\n  a:\n    image: /x\n    level: incremental\n${target}`,
      "4:5: jobs.a.level: an incremental file needs somebody who keeps track of the disk (give 'control', 'qmp' or 'libvirt', or a repository, or level: full)",
    ],
    [
      "jobs:\n  a:\n    images: {r: /x, s: /y}\n    target: /b/{date}\n",
      "4:5: jobs.a.target: has no {disk}, and there are several disks (put {disk} into it)",
    ],
    [
      `jobs:\n  a:\n    qmp: /q\n${target}`,
      "4:5: jobs.a.target: has {disk}, and no disk of the guest is named (give 'disks')",
    ],
    [
      `jobs:\n  a:\n    libvirt: vm1\n${target}`,
      "4:5: jobs.a.target: has {disk}, and no disk of the guest is named (give 'disks')",
    ],
    [
      `jobs:\n  a:\n    image: /x\n    connect: qemu:///session\n${target}`,
      "4:5: jobs.a.connect: goes with 'libvirt' alone (leave it out)",
    ],
    [`jobs:\n  a:\n    control: c\n${target}`, "3:5: jobs.a.control: 'c' is not absolute (begin it with /)"],
    [
      `jobs:\n  a:\n    image: /x\n    options: {since: x}\n${target}`,
      "4:15: jobs.a.options: 'since' is not for here (give `level`)",
    ],
    [
      `jobs:\n  a:\n    image: /x\n    options: {rate-limt: 5M}\n${target}`,
      "4:15: jobs.a: backup refuses it: --rate-limt: is not an option (did you mean 'rate-limit'?)",
    ],
    [
      `jobs:\n  a:\n    image: /x\n    options: {spill-limit: 5M}\n${target}`,
      "4:15: jobs.a: backup refuses it: --spill-limit: needs --control (no guest writes to SOURCE, so there is no buffer)",
    ],
    [
      `jobs:\n  a:\n    image: x.raw\n${target}`,
      "3:5: jobs.a.image: 'x.raw' is not absolute (begin it with /)",
    ],
    [
      `jobs:\n  a:\n    images: {r: /x, s: y}\n${target}`,
      "3:21: jobs.a.images: 'y' is not absolute (begin it with /)",
    ],
    [
      `jobs:\n  a:\n    image: /x\n    hook: [bin/mount, x]\n${target}`,
      "4:5: jobs.a.hook: 'bin/mount' is not absolute (begin it with /)",
    ],
    [
      `jobs:\n  a:\n    control: /c\n    freeze: agent\n${target}`,
      "4:5: jobs.a.freeze: 'agent' is not absolute (begin it with /)",
    ],
    ...["{}", "{last: 0, daily: 0}"].map((keep): [string, string] => [
      `jobs:\n  a:\n    image: /x\n    keep: ${keep}\n${target}`,
      "4:5: jobs.a.keep: keeps nothing (give at least one rule, such as keep: {last: 3}, or leave it out)",
    ]),
    [
      "jobs:\n  a:\n    image: /x\n    target: nbd://h/x\n    keep: {last: 1}\n",
      "5:5: jobs.a.keep: goes with files and repositories, and the target is written in place (leave it out)",
    ],
  ])("%j", async (text, line) => {
    write("f.yaml", text);
    expect((await load()).faults.map(faultLine)).toEqual([`${folder}/f.yaml:${line}`]);
  });
});

it("inherits: the job's own goes before its file's, that before defaults.yaml's, and options one by one", async () => {
  write(
    "defaults.yaml",
    "defaults:\n  repository: /all\n  retries: 1\n  retry-wait: 9\n  options: {workers: 1, direct: true}\n",
  );
  const [a, b] = await jobsOf(
    "defaults:\n  target: /b/{disk}-{date}.raw\n  retries: 2\n  options: {workers: 2}\n" +
      "jobs:\n  a: {image: /x.raw, retries: 3, full-every: 2w}\n  b: {image: /y, repository: /mine, group: web}\n",
  );
  expect(a).toMatchObject({ retries: 3, retryWaitMs: 9000, fullEveryMs: 14 * 86_400_000, group: "a" });
  expect(a?.target).toMatchObject({ kind: "pattern" });
  expect(a?.source).toEqual({ kind: "images", disks: [{ name: "x", image: "/x.raw" }] });
  expect(a?.options).toEqual(["--workers=2", "--direct"]);
  expect(b).toMatchObject({ retries: 2, target: { kind: "repository", repository: "/mine" }, group: "web" });
});

it.each(["require-mount:", "require-mount: *nothing", "require-mount: /a\n  require-mount: /b"])(
  "runs no job with a key that could not be read: %j",
  async (line) => {
    // A job without its mount point would fill the disk below it.
    write("a.yaml", `jobs:\n a:\n  image: /x\n  target: "/b/{date}"\n  ${line}\n`);
    write("b.yaml", `defaults:\n  ${line}\njobs: {b: {image: /x, target: "/b/{date}"}}\n`);
    const { jobs, names, faults: wrong } = await load();
    expect(wrong.map(({ file }) => file)).toEqual([`${folder}/a.yaml`, `${folder}/b.yaml`]);
    expect([jobs, [...names]]).toEqual([[], ["a", "b"]]);
  },
);

it("runs no job of a file whose defaults are wrong, nor any where defaults.yaml is", async () => {
  const good = "jobs: {NAME: {image: /x, target: '/b/{date}'}}\n";
  write("a.yaml", good.replace("NAME", "a"));
  write("b.yaml", `defaults: {keep: {last: x}}\n${good.replace("NAME", "b")}`);
  const one = await load();
  expect(one.jobs.map(({ name }) => name)).toEqual(["a"]);
  expect([...one.names]).toEqual(["a", "b"]);
  write("defaults.yaml", "defaults: {require-mount: backup}\n");
  expect((await load()).jobs).toEqual([]);
});

it("takes addresses for images, and is at home nowhere else", async () => {
  const images = ["nbd://h/x", "rbd:p/i", "/repo::web/root", "s3:https://h/b::web", "/vm/a b.raw"];
  const jobs = await jobsOf(
    images
      .map((image, n) => `j${n}: {image: "${image}", target: "/b/{date}"}`)
      .reduce((all, one) => `${all}  ${one}\n`, "jobs:\n"),
  );
  expect(jobs.map(({ source }) => (source.kind === "images" ? source.disks[0]?.image : undefined))).toEqual(
    images,
  );
});

it("refuses two jobs of one name, and files that others may write", async () => {
  write("a.yaml", "jobs: {x: {image: /x, target: '/b/{date}'}}");
  write("b.yaml", "jobs: {x: {image: /x, target: '/b/{date}'}}");
  write("c.yaml", "jobs: {y: {image: /x, target: '/b/{date}'}}");
  chmodSync(join(folder, "c.yaml"), 0o666);
  const { jobs, faults: wrong } = await load();
  expect(jobs.map(({ name }) => name)).toEqual(["x"]);
  expect(wrong.map(({ problem }) => problem)).toEqual([
    `is in ${folder}/a.yaml, too`,
    "can be written by everybody",
  ]);
});

describe("docs/schema/job-file.json", () => {
  const schema = JSON.parse(readFileSync("docs/schema/job-file.json", "utf8")) as Schema;

  it("is what the parser knows", () => {
    expect(schema).toEqual(JSON.parse(JSON.stringify(jobFileSchema())));
  });

  it("takes what the parser takes, and refuses what it refuses", () => {
    const isValid = (text: string): boolean =>
      new Validator(schema, "2020-12", false).validate(parse(text)).valid;
    for (const example of examplesIn("docs/jobs.md")) {
      expect(readJobFile("docs/jobs.md", example).faults.map(faultLine)).toEqual([]);
      expect(isValid(example), example).toBe(true);
    }
    for (const wrong of [
      "job: {}",
      "jobs: {a: {imag: x}}",
      "jobs: {a: {keep: {daly: 1}}}",
      "jobs: {a: {level: x}}",
      "jobs: {a: {time-limit: 0}}",
      "jobs: {a: {time-limit: 0.0h}}",
      "jobs: {a: {mail: a b}}",
    ]) {
      expect(faults(wrong)).not.toEqual([]);
      expect(isValid(wrong), wrong).toBe(false);
    }
  });
});

/** The page's blocks of YAML. */
function examplesIn(page: string): string[] {
  const blocks = [...readFileSync(page, "utf8").matchAll(/```yaml\n([^]*?)```/g)].map(
    ([, text]) => text ?? "",
  );
  expect(blocks.length).toBeGreaterThan(1);
  return blocks;
}
