// What packaging/ makes and holds: manual pages, completions in a real shell, units. The tarball and the Debian package:
// test/long/packages.test.ts.
import { execFileSync, spawnSync } from "node:child_process";
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { COMMAND_NAMES } from "../../../src/cli/output/exit-codes.js";
import { JOB_MEMBERS } from "../../../src/run/file/job-shape.js";

const UNITS = "packaging/systemd";
const MAN = "dist/man";
let folder: string;
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), "cowcatcher-packaging-"));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const has = (program: string): boolean => spawnSync("sh", ["-c", `command -v ${program}`]).status === 0;

describe("manual pages", () => {
  it("are there for every command and for the job file, with each of its keys", () => {
    const pages = COMMAND_NAMES.map((name) => `cowcatcher-${name}.1`);
    expect(readdirSync(MAN).sort()).toEqual([...pages, "cowcatcher-jobs.5", "cowcatcher.1"].sort());
    // What npm links into its folder of manual pages.
    const { man } = JSON.parse(readFileSync("package.json", "utf8")) as { man: string[] };
    expect(man.map((path) => path.replace("./dist/man/", "")).sort()).toEqual(readdirSync(MAN).sort());
    const jobs = readFileSync(join(MAN, "cowcatcher-jobs.5"), "utf8");
    for (const key of Object.keys(JOB_MEMBERS))
      expect(jobs).toContain(`\n\\fB${key.replaceAll("-", "\\-")}\\fR: `);
  });

  it("hold what --help says: options, exit codes, examples", () => {
    const page = readFileSync(join(MAN, "cowcatcher-run.1"), "utf8");
    expect(page).toContain("\\fB\\-j, \\-\\-parallel <N>\\fR\njobs at a time (1)");
    expect(page).toContain('.TP\n.B "10"\nanother run has the disk or the repository, or another backup');
    expect(page).toContain("cowcatcher run vm1 \\-\\-dry\\-run\n.EE");
  });

  it.skipIf(!has("mandoc"))("are clean to mandoc", () => {
    const pages = readdirSync(MAN).map((name) => join(MAN, name));
    const { status, stdout } = spawnSync("mandoc", ["-T", "lint", ...pages], { encoding: "utf8" });
    expect(stdout).toBe("");
    expect(status).toBe(0);
  });
});

describe("bash completion", () => {
  /** What is offered for the last word. */
  function complete(words: string): string[] {
    const script = `source dist/completions/cowcatcher.bash
      COMP_WORDS=(${words}) COMP_CWORD=$((\${#COMP_WORDS[@]} - 1)); _cowcatcher; printf '%s\\n' "\${COMPREPLY[@]}"`;
    const text = execFileSync("bash", ["-c", script], {
      encoding: "utf8",
      env: { ...process.env, PATH: `${folder}:${process.env["PATH"]}` },
    });
    return text.split("\n").filter((word) => word !== "");
  }

  it("knows commands, their parts, options, and where files belong", () => {
    expect(complete("cowcatcher re")).toEqual(["restore", "repo"]);
    expect(complete("cowcatcher ''")).toEqual(expect.arrayContaining([...COMMAND_NAMES]));
    expect(complete("cowcatcher repo v")).toEqual(["verify"]);
    expect(complete("cowcatcher backup --rate")).toEqual(["--rate-limit"]);
    expect(complete("cowcatcher repo forget --keep-d")).toEqual(["--keep-daily"]);
    expect(complete("cowcatcher jobs ''")).toEqual(["cancel", "pause", "resume", "set-speed"]);
    // Nothing of ours: the shell's own files.
    expect(complete("cowcatcher backup --control --d")).toEqual([]);
    expect(complete("cowcatcher backup di")).toEqual([]);
    expect(complete("cowcatcher nonsense ''")).toEqual([]);
  });

  it("knows the jobs' names", () => {
    const document = { files: ["/etc/x"], jobs: ["vm1", "vm2"], faults: [] };
    writeFileSync(join(folder, "document"), JSON.stringify(document, null, 4));
    writeFileSync(
      join(folder, "cowcatcher"),
      `#!/bin/sh\n[ "$*" = "run --check --json" ] && cat ${folder}/document\n`,
      { mode: 0o755 },
    );
    expect(complete("cowcatcher run ''")).toEqual(["vm1", "vm2"]);
    expect(complete("cowcatcher run --par")).toEqual(["--parallel"]);
  });
});

describe.skipIf(!has("systemd-analyze"))("systemd's units", () => {
  /** Copies that name this program, and an instance of the templates. */
  beforeAll(() => {
    for (const name of readdirSync(UNITS)) {
      const text = readFileSync(join(UNITS, name), "utf8").replaceAll(
        "/usr/bin/cowcatcher",
        resolve("bin/cowcatcher"),
      );
      writeFileSync(join(folder, name), text);
      writeFileSync(join(folder, name.replace("@", "@web")), text);
    }
  });

  it("are right to systemd", () => {
    const units = [
      "cowcatcher-run.service",
      "cowcatcher-run.timer",
      "cowcatcher-serve@web.service",
      "cowcatcher-serve@web.socket",
    ];
    const { status, stderr } = spawnSync(
      "systemd-analyze",
      ["verify", "--man=no", ...units.map((unit) => join(folder, unit))],
      {
        encoding: "utf8",
      },
    );
    expect(stderr).toBe("");
    expect(status).toBe(0);
  });

  it("leave the server little that it does not need", () => {
    const unit = join(folder, "cowcatcher-serve@web.service");
    // The lower the safer; 10 is a service without any of it.
    const { status, stdout } = spawnSync(
      "systemd-analyze",
      ["security", "--offline=yes", "--threshold=30", unit],
      { encoding: "utf8" },
    );
    expect(status, stdout).toBe(0);
  });
});
