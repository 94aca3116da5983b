// A target that is the disk of a guest, or part of it, under every name that it can have. Without libc no image lock
// comes to help, so what refuses here is the comparison alone. After each refusal the disk is what it was.
import { execFileSync } from "node:child_process";
import {
  existsSync,
  linkSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { join, relative } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import type { JobOptions } from "../../../src/backup/options.js";
import { argumentsFromBackup } from "../../../src/control/backup-arguments.js";
import { ControlClient } from "../../../src/qmp/client.js";
import { watchJob } from "../../../src/control/jobs-from-qmp.js";
import { CowcatcherError } from "../../../src/errors.js";
import { absoluteName } from "../../../src/file-names.js";
import { cowcatcher, run } from "../../support/cli.js";
import { expectSame, makeDisk, noise } from "../../support/disks.js";
import { type RunningServer, startServer } from "../../support/nbd-servers.js";
import { mustRun, scratchFolder, Server, stopAll } from "../../support/server.js";

const MiB = 1024 * 1024;
const WITHOUT_LOCKS = { COWCATCHER_NO_NATIVE: "1" };
/** Each write takes long enough for a job to be paused before it is over. */
const SLOW = { COWCATCHER_FAULTS: "target-write:delay=150ms" };
const CONTENT = noise(2 * MiB);

let folder: string;
const at = (name: string): string => join(folder, name);
const detached: (() => void)[] = [];

beforeEach(() => {
  folder = scratchFolder();
});
afterEach(async () => {
  Orders.closeAll();
  await stopAll();
  for (const detach of detached.splice(0)) detach();
});

/** A loop device over the file; null where there is none to be had (it takes root). */
function loopOver(file: string): string | null {
  try {
    const device = execFileSync("losetup", ["--find", "--show", file], {
      encoding: "utf8",
      stdio: "pipe",
    }).trim();
    detached.push(() => void execFileSync("losetup", ["--detach", device]));
    return device;
  } catch {
    return null;
  }
}

function canLoop(): boolean {
  const probe = join(scratchFolder(), "probe");
  writeFileSync(probe, Buffer.alloc(MiB));
  const device = loopOver(probe);
  for (const detach of detached.splice(0)) detach();
  return device !== null;
}
const hasLoop = canLoop();

/** One line, of that object and about that, with the exit code of a usage error. */
function expectRefusal(
  { code, stderr }: { code: number; stderr: string },
  target: string,
  about: RegExp,
): void {
  expect(stderr.split("\n")).toHaveLength(2);
  expect(stderr).toContain(`${target}: `);
  expect(stderr).toMatch(about);
  expect(stderr).toMatch(/\(.+\)\n$/);
  expect(code).toBe(2);
}

/** Asks the server as a management program does: nothing looks at the paths before it. */
class Orders {
  static readonly #open = new Set<ControlClient>();

  private constructor(private readonly client: ControlClient) {}

  static async of(server: Server): Promise<Orders> {
    const client = await ControlClient.connect(server.control);
    Orders.#open.add(client);
    return new Orders(client);
  }

  static closeAll(): void {
    for (const client of Orders.#open) client.close();
    Orders.#open.clear();
  }

  start(
    target: string,
    options: Partial<JobOptions> = {},
    disk = "disk",
    id = `job-${disk}`,
  ): Promise<unknown> {
    const targetFormat = target.endsWith(".qcow2") ? "qcow2" : "raw";
    return this.client.execute(
      "drive-backup",
      argumentsFromBackup({ id, disk, options: { target, targetFormat, ...options } }),
    );
  }

  startGroup(targets: Record<string, string>): Promise<unknown> {
    const actions = Object.entries(targets).map(([disk, target]) => ({
      type: "drive-backup",
      data: argumentsFromBackup({ id: `job-${disk}`, disk, options: { target, targetFormat: "raw" } }),
    }));
    return this.client.execute("transaction", { actions });
  }

  /** Waits for its good end. */
  async end(id: string): Promise<void> {
    const { error } = await watchJob(this.client, id, () => undefined, { pollMs: 20 });
    expect(error).toBeUndefined();
  }

  execute(command: string, id: string): Promise<unknown> {
    return this.client.execute(command, { id });
  }

  async refuse(
    about: RegExp,
    target: string,
    options: Partial<JobOptions> = {},
    disk = "disk",
  ): Promise<void> {
    const before = readdirSync(folder).sort();
    const error = await this.start(target, options, disk).catch((reason: unknown) => reason);
    expect(error, target).toBeInstanceOf(CowcatcherError);
    const object = /^nbd(\+unix)?:/.test(target) ? target : absoluteName(target);
    expect(error).toMatchObject({ code: "USAGE", object });
    expect((error as CowcatcherError).message).toMatch(about);
    expect((error as CowcatcherError).hint).toBeDefined();
    expect(readdirSync(folder).sort()).toEqual(before);
  }
}

describe("a live backup's target", () => {
  it("is not the served file by another name", async () => {
    const disk = await makeDisk(at("disk.raw"), CONTENT);
    linkSync(disk, at("hard.raw"));
    symlinkSync(disk, at("soft.raw"));
    mkdirSync(at("sub"));
    symlinkSync(folder, at("sub/up"));
    const { ino } = statSync(disk);
    const server = await Server.start(folder, [disk], { env: WITHOUT_LOCKS });
    const orders = await Orders.of(server);
    const names = [disk, at("hard.raw"), at("soft.raw"), at("sub/up/disk.raw"), at("sub/../disk.raw")];
    names.push(relative(process.cwd(), disk));
    for (const name of names) {
      await orders.refuse(/is source and target at once/, name, { force: true });
      await orders.refuse(/is source and target at once/, name);
    }
    // Its own descriptor of the disk, in the server.
    const fds = readdirSync(`/proc/${server.process.pid}/fd`);
    const paths = server.openFiles();
    expect(paths).toContain(disk);
    for (const fd of fds) {
      if (statSync(`/proc/${server.process.pid}/fd/${fd}`, { throwIfNoEntry: false })?.ino !== ino) continue;
      await orders.refuse(/is source and target at once.*disk\.raw/, `/dev/fd/${fd}`, { force: true });
    }
    expect(statSync(disk).ino).toBe(ino);
    expect(readFileSync(disk).equals(CONTENT)).toBe(true);
  });

  it("is not the served file after it was renamed", async () => {
    const disk = await makeDisk(at("disk.raw"), CONTENT);
    const server = await Server.start(folder, [disk], { env: WITHOUT_LOCKS });
    const orders = await Orders.of(server);
    renameSync(disk, at("moved.raw"));
    await orders.refuse(/is source and target at once.*disk\.raw/, at("moved.raw"), { force: true });
    expect(readFileSync(at("moved.raw")).equals(CONTENT)).toBe(true);
  });

  it("is not another disk that is served, nor a layer or data file of one", async () => {
    const base = await makeDisk(at("base.raw"), CONTENT);
    const top = at("top.qcow2");
    await mustRun("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top);
    const split = at("split.qcow2");
    const data = at("split.data");
    await mustRun("qemu-img", "create", "-q", "-f", "qcow2", "-o", `data_file=${data}`, split, "1M");
    const plain = await makeDisk(at("plain.raw"), CONTENT);
    const server = await Server.start(folder, [`${plain}=plain`, `${top}=top`, `${split}=split`], {
      env: WITHOUT_LOCKS,
    });
    const orders = await Orders.of(server);
    const onPlain = (target: string, about: RegExp): Promise<void> =>
      orders.refuse(about, target, { force: true }, "plain");
    await onPlain(top, /is the disk of a guest that is served here/);
    await onPlain(base, /is in the backing chain of '.*top\.qcow2', which is served here/);
    await onPlain(data, /is the data file of '.*split\.qcow2', which is served here/);
    await orders.refuse(/in the backing chain of the source/, base, { force: true }, "top");
    await orders.refuse(/is the data file of the source/, data, { force: true }, "split");
    expect(readFileSync(base).equals(CONTENT)).toBe(true);
  });

  it.runIf(hasLoop)("is not a second node of the served device, nor what is below it", async () => {
    const file = await makeDisk(at("disk.raw"), CONTENT);
    const device = loopOver(file) ?? "";
    const node = at("node");
    const minor = String(statSync(device).rdev & 0xff);
    execFileSync("mknod", [node, "b", "7", minor]);
    const server = await Server.start(folder, [device], { env: WITHOUT_LOCKS });
    const orders = await Orders.of(server);
    await orders.refuse(/is source and target at once: it is '.*loop\d+' by/, node, { force: true });
    await orders.refuse(/at once: '.*loop\d+' lies on it/, file, { force: true });
    await server.stop();
    expect(readFileSync(file).equals(CONTENT)).toBe(true);
  });

  it.runIf(hasLoop)("is not a loop device over the served file", async () => {
    const disk = await makeDisk(at("disk.raw"), CONTENT);
    const device = loopOver(disk) ?? "";
    const server = await Server.start(folder, [disk], { env: WITHOUT_LOCKS });
    const orders = await Orders.of(server);
    await orders.refuse(/at once: it lies on '.*disk\.raw'/, device, { force: true });
    expect(readFileSync(disk).equals(CONTENT)).toBe(true);
  });

  it("is no export of the server itself, however it is reached", async () => {
    const disk = await makeDisk(at("disk.raw"), CONTENT);
    const server = await Server.start(folder, [disk]);
    const orders = await Orders.of(server);
    symlinkSync(server.socket, at("link.sock"));
    const uris = [server.uri(), server.uri(""), `nbd+unix:///disk?socket=${at("link.sock")}`];
    for (const uri of uris) await orders.refuse(/is an export of this very server/, uri);
    expect(readFileSync(disk).equals(CONTENT)).toBe(true);
  });

  it("is no export of the server itself by TCP", async () => {
    const disk = await makeDisk(at("disk.raw"), CONTENT);
    const { orders, port } = await tcpServer(disk);
    for (const host of ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "127.1.2.3"]) {
      const uri = `nbd://${host}:${port}/disk`;
      await orders.refuse(/is an export of this very server/, uri);
    }
    expect(readFileSync(disk).equals(CONTENT)).toBe(true);
  });

  it("is not the export that is served on", async () => {
    const disk = await makeDisk(at("disk.raw"), CONTENT);
    const { uri } = await farServer(disk);
    const server = await Server.start(folder, [uri]);
    const orders = await Orders.of(server);
    await orders.refuse(/is source and target at once/, uri);
    const socket = /socket=(.*)$/.exec(uri)?.[1] ?? "";
    symlinkSync(socket, at("other.sock"));
    await orders.refuse(/at once: it is the export/, `nbd+unix:///far?socket=${at("other.sock")}`);
    await orders.refuse(/may be '.*name both/, `nbd+unix:///?socket=${socket}`);
    expect(readFileSync(disk).equals(CONTENT)).toBe(true);
  });
});

/** Another project's server, whose export has a name. */
function farServer(image: string): Promise<RunningServer> {
  const args = (socket: string): string[] => [
    "-t",
    "--shared=16",
    "-f",
    "raw",
    "-x",
    "far",
    "-k",
    socket,
    image,
  ];
  return startServer("qemu-nbd", args, { exportName: "far" });
}

/** A server whose NBD side is TCP, on a port that the system chose. */
async function tcpServer(disk: string): Promise<{ orders: Orders; port: string }> {
  const listen = ["--port", "0", "--bind", "0.0.0.0"];
  const server = await Server.start(folder, [disk], { listen });
  const line = await server.process.line((text) => text.includes("listening"));
  return { orders: await Orders.of(server), port: /:(\d+) /.exec(line)?.[1] ?? "" };
}

describe("a target's backing file", () => {
  it("may be what the served disk is built on", async () => {
    const base = await makeDisk(at("base.raw"), CONTENT);
    const top = at("top.qcow2");
    await mustRun("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top);
    const server = await Server.start(folder, [top]);
    await server.backup(at("t.qcow2"), "-b", base, "-B", "raw").succeed();
    await expectSame(at("t.qcow2"), base);
  });

  it.each([WITHOUT_LOCKS, {}])("is no disk that a guest writes, under any name (%o)", async (env) => {
    const disk = await makeDisk(at("disk.raw"), CONTENT);
    linkSync(disk, at("hard.raw"));
    const overlay = at("overlay.qcow2");
    await mustRun("qemu-img", "create", "-q", "-f", "qcow2", "-b", at("hard.raw"), "-F", "raw", overlay);
    const server = await Server.start(folder, [disk], { env });
    const orders = await Orders.of(server);
    const about = /backing file '.*' is served here and a guest may write it/;
    for (const backing of [disk, at("hard.raw")]) {
      await orders.refuse(about, at("t.qcow2"), { backingFile: backing, backingFormat: "raw" });
    }
    if (env === WITHOUT_LOCKS)
      await orders.refuse(about, at("t.qcow2"), { backingFile: overlay, backingFormat: "qcow2" });
  });

  it("is on no export that a guest writes, nor on one of the server's own", async () => {
    const disk = await makeDisk(at("disk.raw"), CONTENT);
    const far = await farServer(await makeDisk(at("far.raw"), CONTENT));
    const server = await Server.start(folder, [`${disk}=disk`, `${far.uri}=far`]);
    const orders = await Orders.of(server);
    const about = /its backing file 'nbd.*' is served here and a guest may write it/;
    for (const [name, uri] of Object.entries({ own: server.uri(), far: far.uri })) {
      const overlay = at(`on-${name}.qcow2`);
      await mustRun("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", uri, "-F", "raw", overlay, "2M");
      await orders.refuse(about, at("t.qcow2"), { backingFile: overlay, backingFormat: "qcow2" });
    }
  });

  it("may be a disk that is served read-only", async () => {
    const disk = await makeDisk(at("disk.raw"), CONTENT);
    const server = await Server.start(folder, [disk], { env: WITHOUT_LOCKS, args: ["--read-only"] });
    await server.backup(at("t.qcow2"), "-b", disk, "-B", "raw").succeed();
    await expectSame(at("t.qcow2"), disk);
  });

  it("is not what the target replaces, nor built on it", async () => {
    const source = await makeDisk(at("source.raw"), CONTENT);
    const monday = await makeDisk(at("monday.qcow2"), noise(2 * MiB, 5));
    const tuesday = at("tuesday.qcow2");
    await mustRun("qemu-img", "create", "-q", "-f", "qcow2", "-b", monday, "-F", "qcow2", tuesday);
    linkSync(monday, at("hard.qcow2"));
    const before = readFileSync(monday);
    const refuse = async (backing: string, target: string, about: RegExp): Promise<void> => {
      const args = ["backup", "-q", "--force", "-b", backing, "-B", "qcow2", source, target];
      expectRefusal(await cowcatcher(args, { env: WITHOUT_LOCKS }), target, about);
      expect(readFileSync(monday).equals(before)).toBe(true);
    };
    await refuse(monday, monday, /is its own backing file/);
    await refuse(at("hard.qcow2"), monday, /is its own backing file: it is '.*hard\.qcow2' by another name/);
    await refuse(tuesday, monday, /is in its own backing chain/);
    const server = await Server.start(folder, [source]);
    const orders = await Orders.of(server);
    const about = /is in its own backing chain/;
    await orders.refuse(about, monday, { force: true, backingFile: tuesday, backingFormat: "qcow2" });
    expect(readFileSync(monday).equals(before)).toBe(true);
  });

  it("is locked until the backup is over", async () => {
    const source = await makeDisk(at("source.raw"), CONTENT);
    const base = await makeDisk(at("base.qcow2"), CONTENT);
    const orders = await Orders.of(await Server.start(folder, [`${source}=a`], { env: SLOW }));
    await orders.start(at("t.qcow2"), { backingFile: base, backingFormat: "qcow2" }, "a");
    await orders.execute("job-pause", "job-a");
    const write = ["-f", "qcow2", "-c", "write 0 4k", base];
    const refused = await run("qemu-io", write);
    expect([refused.code, refused.stderr]).toEqual([1, expect.stringMatching(/lock/)]);
    await orders.execute("job-resume", "job-a");
    await orders.end("job-a");
    expect((await run("qemu-io", write)).code).toBe(0);
  });
});

describe("two jobs", () => {
  async function serveTwo(env: Record<string, string> = {}): Promise<Orders> {
    const disks = await Promise.all(["a", "b"].map((name) => makeDisk(at(`${name}.raw`), CONTENT)));
    return Orders.of(await Server.start(folder, [`${disks[0]}=a`, `${disks[1]}=b`], { env }));
  }

  it("have no target in common, by whatever path", async () => {
    mkdirSync(at("folder"));
    symlinkSync(at("folder"), at("same"));
    const orders = await serveTwo(SLOW);
    await orders.start(at("folder/t.raw"), {}, "a");
    await orders.execute("job-pause", "job-a");
    const about = /same\/t\.raw: the job job-a writes there already, as '.*folder\/t\.raw'/;
    await expect(orders.start(at("same/t.raw"), {}, "b")).rejects.toThrow(about);
    await expect(orders.start(at("folder/t.raw"), {}, "b")).rejects.toMatchObject({ code: "BUSY" });
    await orders.start(at("folder/u.raw"), {}, "b");
    await orders.end("job-b");
    await orders.execute("job-resume", "job-a");
    await orders.end("job-a");
    await orders.start(at("folder/t.raw"), { force: true }, "b");
    await orders.end("job-b");
  });

  it("of one group neither, and a group that is refused holds nothing", async () => {
    symlinkSync(folder, at("same"));
    const orders = await serveTwo();
    const group = orders.startGroup({ a: at("t.raw"), b: at("same/t.raw") });
    await expect(group).rejects.toThrow(/same\/t\.raw: the job job-a writes there already/);
    expect(existsSync(at("t.raw"))).toBe(false);
    await orders.start(at("t.raw"), {}, "a");
    await orders.end("job-a");
  });

  it("nor an export", async () => {
    const store = at("store.raw");
    writeFileSync(store, Buffer.alloc(2 * MiB));
    const { uri } = await farServer(store);
    const orders = await serveTwo(SLOW);
    await orders.start(uri, {}, "a");
    await orders.execute("job-pause", "job-a");
    await expect(orders.start(uri, {}, "b")).rejects.toThrow(/the job job-a writes there/);
    await orders.execute("job-resume", "job-a");
    await orders.end("job-a");
    expect(readFileSync(store).equals(CONTENT)).toBe(true);
  });
});

describe("an offline backup's target", () => {
  it("is no layer or data file of the source, and no export that it is", async () => {
    const base = await makeDisk(at("base.raw"), CONTENT);
    const top = at("top.qcow2");
    await mustRun("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top);
    const split = at("split.qcow2");
    const data = at("split.data");
    await mustRun("qemu-img", "create", "-q", "-f", "qcow2", "-o", `data_file=${data}`, split, "1M");
    const { uri } = await farServer(await makeDisk(at("far.raw"), CONTENT));
    const far = at("far.qcow2");
    await mustRun("qemu-img", "create", "-q", "-f", "qcow2", "-b", uri, "-F", "raw", far);
    for (const [source, target, about] of [
      [top, base, /in the backing chain of the source/],
      [split, data, /is the data file of the source/],
      [uri, uri, /is source and target at once/],
      [far, uri, /in the backing chain of the source/],
    ] as const) {
      for (const extra of [[], ["--dry-run"]]) {
        const args = ["backup", "-q", "--force", "-O", "raw", ...extra, source, target];
        if (extra.length > 0 && target === uri) continue;
        expectRefusal(await cowcatcher(args, { env: WITHOUT_LOCKS }), target, about);
      }
    }
    expect(readFileSync(base).equals(CONTENT)).toBe(true);
    rmSync(at("far.raw"));
  });
});
