// --freeze: T0 of a live backup lies where the guest agent has the guest frozen, by --qmp and by --control; and what
// Debian's real agent says is understood.
import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, readFileSync, readdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { cowcatcher } from "../../support/cli.js";
import { guestWith, ScriptedAgent } from "../../support/guest-agent.js";
import { expectSchema } from "../../support/json-schema.js";
import { Qemu } from "../../support/qemu.js";
import { Backup, Process, scratchFolder, Server, stopAll, until } from "../../support/server.js";

const has = (program: string): boolean => spawnSync(program, ["--version"]).status === 0;
const hasQemu = has("qemu-system-x86_64");

describe("backup --freeze", () => {
  let folder = "";
  let fleece = "";
  let agent: ScriptedAgent;

  beforeEach(async () => {
    folder = scratchFolder();
    fleece = join(folder, "fleece");
    mkdirSync(fleece);
    agent = await new ScriptedAgent(guestWith(2)).listen();
  });
  afterEach(async () => {
    agent.close();
    await stopAll();
  });

  it.skipIf(!hasQemu)(
    "has QEMU's disks at an instant of the freeze; a real agent's refusal leaves nothing",
    async () => {
      const qemu = await Qemu.start(folder, { diskCount: 2, running: true, sizeBytes: 4 * 1024 * 1024 });
      await qemu.fill();
      const before = await qemu.state();
      qemu.startWriting();
      const frozenAt: number[] = [];
      // A guest that writes nothing while it is frozen.
      const guest = guestWith(2);
      agent.script = async (command) => {
        if (command === "guest-fsfreeze-freeze") {
          await qemu.stopWriting();
          frozenAt.push(qemu.writes.length);
        }
        if (command === "guest-fsfreeze-thaw") qemu.startWriting();
        return guest(command);
      };
      const disks = ["--disk", "vd0", "--disk", "vd1", "-O", "raw", "--fleece-dir", fleece];
      const targets = [join(folder, "a.img"), join(folder, "b.img")];
      const args = ["--qmp", qemu.monitor, ...disks, ...targets];
      const summary = await new Backup([...args, "--freeze", agent.path]).succeed();
      await qemu.stopWriting();
      expect(qemu.instantOf(targets, 1)).toBe(frozenAt[0]);
      expect(qemu.writes.length).toBeGreaterThan(frozenAt[0] ?? Infinity);
      expect(agent.done.slice(-2)).toEqual(["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]);
      expect(summary).toMatchObject({ guest_frozen_file_systems: 2, guest_freeze_held: true });
      expectSchema("backup", summary);
      if (!has("qemu-ga")) return;
      const socket = join(folder, "qga.sock");
      // It would freeze the machine that the test runs on.
      const blocked = ["-b", "guest-fsfreeze-freeze"];
      new Process("qemu-ga", ["-m", "unix-listen", "-p", socket, "-t", folder, ...blocked]);
      await until("the real agent listens", () => existsSync(socket));
      const refused = await new Backup([...args, "--force", "--freeze", socket]).end();
      expect(refused.code).toBe(1);
      expect(refused.stderr).toMatch(/qga\.sock: the guest agent refuses guest-fsfreeze-freeze: .*disabled/);
      expect(await qemu.state()).toEqual(before);
      expect(readdirSync(fleece)).toEqual([]);
      const thawed = await cowcatcher(["backup", "--cleanup", "--freeze", socket, "--json"]);
      expect(JSON.parse(thawed.stdout)).toEqual({ removed: [], thawed_file_systems: 0 });
      expectSchema("cleanup", JSON.parse(thawed.stdout));
    },
  );

  it("has a served disk's T0 within the freeze, and thaws when the backup is interrupted there", async () => {
    const image = join(folder, "disk.img");
    writeFileSync(image, Buffer.alloc(1024 * 1024, 7));
    const server = await Server.start(folder, [image]);
    const times: number[] = [];
    const guest = guestWith(3);
    agent.script = (command) => {
      if (command === "guest-fsfreeze-freeze" || command === "guest-fsfreeze-thaw") times.push(Date.now());
      return guest(command);
    };
    const target = join(folder, "backup.img");
    const summary = await server.backup("--freeze", agent.path, target).succeed();
    const t0 = Date.parse((summary as unknown as { t0: string }).t0);
    expect(t0).toBeGreaterThanOrEqual(times[0] ?? Infinity);
    expect(t0).toBeLessThanOrEqual(times[1] ?? 0);
    expect(readFileSync(target).equals(readFileSync(image))).toBe(true);
    expect(summary).toMatchObject({ guest_frozen_file_systems: 3, guest_freeze_held: true });
    expectSchema("backup", summary);

    let endFreeze: (count: number) => void = () => undefined;
    agent.script = (command) => {
      if (command !== "guest-fsfreeze-freeze") return guest(command);
      return new Promise((resolve) => (endFreeze = resolve));
    };
    agent.asked.length = 0;
    const running = server.backup("--freeze", agent.path, join(folder, "other.img"));
    await until("the guest freezes", () => agent.asked.includes("guest-fsfreeze-freeze"));
    running.process.kill("SIGINT");
    await until("it is to thaw", () => agent.asked.includes("guest-fsfreeze-thaw"));
    endFreeze(3);
    expect((await running.end()).code).toBe(130);
    expect(existsSync(join(folder, "other.img"))).toBe(false);
  });
});
