// The Debian package on a machine with systemd, as docs/operations.md has it: the units start, tell that they are ready, hold a
// guest's socket through a restart and through a kill, and their lines are in the journal by priority.
import { mkdtempSync, rmSync, statSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { canBootCopy, MachineCopy } from "../support/machine-copy.js";
import { mustRun, type Process, stopAll, until } from "../support/server.js";

const SERVE = "cowcatcher-serve@web";
const WAIT_MS = 120_000;

describe.skipIf(!canBootCopy)("the units", () => {
  let folder: string;
  let machine: MachineCopy;

  beforeAll(async () => {
    folder = mkdtempSync(join(tmpdir(), "cowcatcher-systemd-"));
    machine = await MachineCopy.make();
    const built = (await mustRun("sh", "packaging/debian/build.sh", folder)).trim();
    await mustRun("cp", built, join(machine.root, "root"));
    await machine.boot();
    await machine.inside("dpkg", "-i", join("/root", basename(built)));
    await machine.inside("mkdir", "/vm");
    await machine.inside("qemu-img", "create", "-q", "-f", "qcow2", "/vm/web-root.qcow2", "1G");
    await machine.inside("chown", "-R", "cowcatcher:", "/vm");
    await machine.inside("install", "-d", "-o", "cowcatcher", "-g", "cowcatcher", "-m", "700", "/backup/web");
    const log = "--log-file /var/log/cowcatcher/web.log --log-level info";
    machine.write(
      "etc/cowcatcher/serve.d/web",
      `IMAGES=/vm/web-root.qcow2=root\nOPTIONS=--cow-buffer-size 64M ${log}\n`,
    );
    machine.write(
      "etc/cowcatcher/jobs.d/night.yaml",
      `jobs:
  web: {control: /run/cowcatcher/web.control, target: "/backup/web/{disk}-{date}.qcow2"}
  broken: {image: /vm/none.raw, target: "/backup/none/{date}.raw"}
`,
    );
  });
  afterAll(async () => {
    await machine.end();
    await stopAll();
    rmSync(folder, { recursive: true, force: true });
  });

  const property = async (name: string, unit = SERVE): Promise<string> =>
    (await machine.inside("systemctl", "show", "-p", name, "--value", unit)).trim();

  const wrote = (guest: Process): number =>
    guest.lines.filter((line) => line.includes("wrote 65536/65536")).length;

  it("serve a guest through a restart and a kill without an error of its writes, and back it up", async () => {
    // Type=notify: it returns when guests are answered.
    await machine.inside("systemctl", "enable", "--now", `${SERVE}.socket`, `${SERVE}.service`);
    expect(await property("StatusErrno")).toBe("0");
    expect(
      await machine.inside("nbdinfo", "--size", "nbd+unix:///root?socket=/run/cowcatcher/web.sock"),
    ).toBe(`${2 ** 30}\n`);
    expect(
      await machine.inside(
        "stat",
        "-c",
        "%U %G %a",
        "/run/cowcatcher/web.sock",
        "/run/cowcatcher/web.control",
      ),
    ).toBe("cowcatcher kvm 660\ncowcatcher cowcatcher 600\n");
    const guest = machine.start(
      "qemu-io",
      "--image-opts",
      "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path=/run/cowcatcher/web.sock,file.export=root,file.reconnect-delay=300",
    );
    let asked = 0;
    // One after another: qemu-io leaves lines that come together in its buffer.
    const write = async (count: number): Promise<void> => {
      for (const end = asked + count; asked < end;) {
        guest.send(`write -P ${1 + asked} ${asked}M 64k`);
        asked++;
        await until("the guest's write is answered", () => wrote(guest) >= asked, WAIT_MS);
      }
    };
    await write(10);
    const restarting = machine.inside("systemctl", "restart", SERVE);
    await Promise.all([restarting, write(10)]);
    const killed = await property("MainPID");
    await machine.inside("kill", "-9", killed);
    await write(10);
    expect(await property("NRestarts")).toBe("1");
    expect(await property("MainPID")).not.toBe(killed);
    guest.send("quit");
    expect((await guest.end()).code).toBe(0);
    expect(guest.lines.join("\n")).not.toMatch(/failed|error/i);

    // Each job has its result, and the worst one is the unit's.
    await machine.inside("sh", "-c", "systemctl start cowcatcher-run.service || true");
    expect(await property("ExecMainStatus", "cowcatcher-run")).toBe("1");
    const journal = async (...args: string[]): Promise<string> =>
      machine.inside("journalctl", "-u", "cowcatcher-run", "--no-pager", "-o", "cat", ...args);
    await machine.inside("journalctl", "--sync");
    expect(await journal()).toMatch(/^web +done +full +1\.88 MiB /m);
    expect(await journal("-p", "err")).toMatch(/^cowcatcher: broken: \/vm\/none\.raw: /m);
    expect(await journal("-p", "err")).not.toMatch(/web +done/);
  });

  it("write on into a log that was rotated", async () => {
    await machine.inside("logrotate", "-f", "/etc/logrotate.d/cowcatcher");
    const pid = await property("MainPID");
    const files = (): Promise<string> => machine.inside("sh", "-c", `readlink /proc/${pid}/fd/*`);
    await until("the log is opened anew", async () => !(await files()).includes("web.log.1"), WAIT_MS);
    expect(await files()).toMatch(/^\/var\/log\/cowcatcher\/web\.log$/m);
    expect(statSync(join(machine.root, "var/log/cowcatcher/web.log")).mode & 0o777).toBe(0o600);
  });

  it("are right, and the timer is for the night to come", async () => {
    const units = [`${SERVE}.service`, `${SERVE}.socket`, "cowcatcher-run.service", "cowcatcher-run.timer"];
    expect(await machine.inside("systemd-analyze", "verify", "--man=no", ...units)).toBe("");
    await machine.inside("systemctl", "enable", "--now", "cowcatcher-run.timer");
    expect(await property("NextElapseUSecRealtime", "cowcatcher-run.timer")).toMatch(/ 01:\d\d:\d\d /);
  });
});
