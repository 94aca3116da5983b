// The tarball of `npm pack` and the Debian package: installed, used, and the latter purged again, in a copy of this machine
// that is thrown away (which wants root); on a machine with systemd it is in systemd.test.ts. The completions of zsh and fish in real
// shells. Needs zsh, fish, lintian and npm's registry.
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { run } from "../support/cli.js";
import { canCopyMachine, MachineCopy } from "../support/machine-copy.js";

let folder: string;
const at = (name: string): string => join(folder, name);

async function must(program: string, ...args: string[]): Promise<string> {
  const { code, stdout, stderr } = await run(program, args);
  expect(code, `${program} ${args.join(" ")}\n${stdout}\n${stderr}`).toBe(0);
  return stdout;
}

beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), "cowcatcher-packages-"));
  writeFileSync(at("disk.raw"), Buffer.alloc(4 << 20, 7));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

/** A backup, natively and with its workers, and a run. */
async function use(program: string, name: string): Promise<void> {
  const { code, stderr } = await run(program, ["backup", "--verify", at("disk.raw"), at(`${name}.qcow2`)]);
  // Not even the warning that native calls are missing.
  expect([code, stderr]).toEqual([0, ""]);
  await must("qemu-img", "compare", at("disk.raw"), at(`${name}.qcow2`));
  const job = `{image: ${at("disk.raw")}, target: "${at(name)}/{date}.raw"}`;
  writeFileSync(at("jobs.yaml"), `jobs: {night: ${job}}\n`, { mode: 0o600 });
  expect(await must(program, "run", "--all", "--config", at("jobs.yaml"))).toMatch(/night +done/);
}

it("npm's tarball installs without a build, and works", async () => {
  await must("npm", "pack", "--ignore-scripts", "--pack-destination", folder);
  const tarball = at("cowcatcher-0.1.0.tgz");
  const files = await must("tar", "-tzf", tarball);
  expect(files).not.toMatch(/^package\/(src|test|bench|dist\/test|dist\/bench)\//m);
  await must("npm", "install", "--global", "--prefix", at("npm"), tarball);
  await use(at("npm/bin/cowcatcher"), "npm-night");
  expect(existsSync(at("npm/share/man/man1/cowcatcher-run.1"))).toBe(true);
});

it("the Debian package is without errors to lintian, and works", async () => {
  const built = await must("sh", "packaging/debian/build.sh", at("deb"));
  const { code, stdout } = await run("lintian", ["--fail-on", "error", built.trim()]);
  expect(code, stdout).toBe(0);
  await must("dpkg-deb", "-x", built.trim(), at("root"));
  await use(at("root/usr/bin/cowcatcher"), "deb-night");
  for (const name of [
    ...["lib/systemd/system/cowcatcher-run.timer", "usr/share/man/man5/cowcatcher-jobs.5.gz"],
    ...["usr/share/bash-completion/completions/cowcatcher", "usr/lib/sysusers.d/cowcatcher.conf"],
  ]) {
    expect(existsSync(join(at("root"), name)), name).toBe(true);
  }
  const control = await must("dpkg-deb", "--field", built.trim(), "Depends");
  expect(control).toContain("nodejs (>= 20.19)");
});

it.skipIf(!canCopyMachine)("the Debian package is installed by dpkg, used and purged", async () => {
  const machine = await MachineCopy.make();
  const { root } = machine;
  try {
    await machine.prepare();
    const built = (await must("sh", "packaging/debian/build.sh", at("deb"))).trim();
    await must("cp", built, at("disk.raw"), join(root, "root"));
    await machine.inside("dpkg", "-i", join("/root", basename(built)));
    expect(await machine.inside("getent", "passwd", "cowcatcher")).toMatch(/^cowcatcher:/);
    expect(await machine.inside("stat", "-c", "%U %a", "/run/cowcatcher")).toMatch(/^cowcatcher 7\d\d\n$/);
    const backup = ["cowcatcher", "backup", "--verify", "/root/disk.raw", "/root/night.qcow2"];
    expect(await machine.inside(...backup)).toMatch(/verified/);
    await machine.inside("qemu-img", "compare", "/root/disk.raw", "/root/night.qcow2");
    machine.write(
      "etc/cowcatcher/jobs.d/night.yaml",
      'jobs: {night: {image: /root/disk.raw, target: "/root/night/{date}.raw"}}\n',
    );
    expect(await machine.inside("cowcatcher", "run", "--all")).toMatch(/night +done/);
    const installed = (await machine.inside("dpkg", "-L", "cowcatcher")).trim().split("\n");
    await machine.inside("dpkg", "--purge", "cowcatcher");
    const left = installed.filter((path) => path.includes("cowcatcher") && existsSync(join(root, path)));
    // The administrator's own file, and its folder.
    expect(left).toEqual(["/etc/cowcatcher", "/etc/cowcatcher/jobs.d"]);
  } finally {
    machine.remove();
  }
});

describe("completions", () => {
  it("of fish", async () => {
    const complete = (line: string) =>
      must("fish", "--no-config", "-c", `source dist/completions/cowcatcher.fish; complete -C '${line}'`);
    expect(await complete("cowcatcher rest")).toMatch(/^restore\t/);
    expect(await complete("cowcatcher backup --rate")).toMatch(/^--rate-limit\t/m);
    expect(await complete("cowcatcher repo ver")).toMatch(/^verify/m);
  });

  it("of zsh", async () => {
    // A shell at a terminal, as completion works only there.
    const script = `
      zmodload zsh/zpty
      zpty shell zsh -f -i
      zpty -w shell 'autoload -Uz compinit; compinit -u -d ${at("zcompdump")}; PS1=; source dist/completions/_cowcatcher'
      zpty -w shell 'zstyle ":completion:*" list-prompt ""; bindkey "^I" complete-word'
      zpty -n -w shell $'cowcatcher resto\\t'
      zpty -n -w shell $'--veri\\t'
      sleep 3
      zpty -n -w shell $'\\n'
      zpty -w shell exit
      while zpty -r shell line; do print -r -- $line; done`;
    const text = await must("zsh", "-f", "-c", script);
    expect(text).toMatch(/cowcatcher restore\b.*--verify/s);
    expect(readFileSync("dist/completions/_cowcatcher", "utf8")).toContain("#compdef cowcatcher");
  });
});
