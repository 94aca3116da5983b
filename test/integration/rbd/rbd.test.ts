// Ceph RBD images as TARGET and SOURCE, with a real Ceph. Judges: qemu-img with its own rbd driver, rbd export, rbd diff.
import { existsSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from "vitest";
import { sampled } from "../../support/campaign.js";
import { cowcatcher, run } from "../../support/cli.js";
import { testPool, type TestPool } from "../../support/ceph.js";
import { expectSame, makeDisk, noise } from "../../support/disks.js";
import { fails, succeeds } from "../../support/nbd-servers.js";
import { mustRun, Process, scratchFolder, Server, stopAll, until } from "../../support/server.js";

const KiB = 1024;
const MiB = 1024 * KiB;
const OBJECT = 4 * MiB;

let ceph: TestPool;
let folder: string;

beforeAll(async () => {
  ceph = await testPool("rbd-test");
});
beforeEach(() => {
  folder = scratchFolder();
});
afterEach(stopAll);
afterAll(() => expectNothingUnfinished());

const at = (name: string): string => join(folder, name);

/** 40 MiB with objects that are data, zeroes and both, and an odd end. */
function disk(seed = 1): Buffer {
  const content = Buffer.concat([noise(10 * MiB, seed), Buffer.alloc(22 * MiB), noise(8 * MiB, seed + 1)]);
  return content.subarray(0, 39 * MiB + 512);
}

function rawDisk(name: string, content: Buffer): string {
  writeFileSync(at(name), content);
  return at(name);
}

/** As QEMU's own driver reads it. */
async function expectImage(image: string, expected: string): Promise<void> {
  await mustRun("qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", expected, ceph.address(image));
}

/** Bytes in which the image has data since the snapshot, or at all. */
async function diffBytes(image: string, since?: string): Promise<number> {
  const from = since === undefined ? [] : ["--from-snap", since];
  const text = await ceph.rbd("diff", "--format", "json", ...from, `${ceph.pool}/${image}`);
  const extents = JSON.parse(text) as { length: number; exists: string }[];
  return extents.reduce((sum, { length, exists }) => sum + (exists === "true" ? length : 0), 0);
}

async function imageNames(): Promise<string[]> {
  return JSON.parse(await ceph.rbd("ls", "--format", "json", ceph.pool)) as string[];
}

async function expectNothingUnfinished(): Promise<void> {
  expect((await imageNames()).filter((name) => name.includes("cowcatcher"))).toEqual([]);
}

/** A client that has the image open, as far as others can tell. */
async function openElsewhere(image: string): Promise<void> {
  // Until its input ends.
  new Process("rbd", ["-c", ceph.conf, "watch", `${ceph.pool}/${image}`]);
  await until("the image has a watcher", async () =>
    (await ceph.rbd("status", `${ceph.pool}/${image}`)).includes("watcher="),
  );
}

describe("an image as TARGET", () => {
  it("is made, with holes where the disk has them, and has its name when it is whole", async () => {
    const source = rawDisk("disk.raw", disk());
    const output = await succeeds(["backup", "--verify", source, ceph.address("made")]);
    expect(output).toContain("39.0 MiB in ");
    await expectImage("made", source);
    // Six objects of the ten have data; of what else there is nothing is stored.
    expect(await diffBytes("made")).toBeLessThanOrEqual(6 * OBJECT);
    await ceph.rbd("export", "--no-progress", `${ceph.pool}/made`, at("export"));
    expect(readFileSync(at("export")).equals(disk())).toBe(true);
    await expectNothingUnfinished();
    const error = await fails(["backup", "-q", source, ceph.address("made")]);
    expect(error).toContain("the image exists already (give another name, or --force to write it in place)");
  });

  it("is written in place with --force; its snapshots are the history, and each restores", async () => {
    const first = rawDisk("first.raw", disk(1));
    const second = rawDisk("second.raw", Buffer.concat([disk(7), noise(3 * MiB, 3)]));
    const target = ceph.address("history");
    await succeeds(["backup", "-q", "--target-snapshot", "monday", first, target]);
    const again = await fails(["backup", "-q", "--force", "--target-snapshot", "monday", second, target]);
    expect(again).toContain("has a snapshot 'monday' already");
    // The image grows; what was data and is zero now is zero.
    await succeeds(["backup", "-q", "--force", "--verify", "--target-snapshot", "tuesday", second, target]);
    await succeeds(["restore", "-q", ceph.address("history@monday"), at("monday.raw")]);
    await succeeds(["restore", "-q", ceph.address("history@tuesday"), at("tuesday.raw")]);
    await succeeds(["compare", "-q", at("monday.raw"), first]);
    await expectSame(at("tuesday.raw"), second);
    await expectImage("history@monday", first);
  });

  it("gets what a bitmap calls dirty, and nothing else", async () => {
    const source = await makeDisk(at("disk.qcow2"), disk().subarray(0, 39 * MiB));
    const target = ceph.address("incremental");
    await succeeds(["backup", "-q", "-O", "raw", "--target-snapshot", "full", source, target]);
    await mustRun("qemu-img", "bitmap", "--add", source, "b0");
    const writes = ["-c", "write -P 1 1M 64k", "-c", "write -P 2 12M 1M", "-c", "write -z 34M 4M"];
    await mustRun("qemu-io", ...writes, source);
    const options = ["--bitmap", "b0", "--bitmap-mode", "never", "--target-snapshot", "next"];
    expect(await fails(["backup", "-q", ...options, source, target], 2)).toContain("needs --force");
    await succeeds(["backup", "-q", "--force", ...options, source, target]);
    await mustRun(
      "qemu-img",
      "compare",
      "-q",
      "-f",
      "qcow2",
      "-F",
      "raw",
      source,
      ceph.address("incremental@next"),
    );
    // Objects are the unit of rbd diff's fast way: those of the two writes.
    const changed = JSON.parse(
      await ceph.rbd("diff", "--format", "json", "--from-snap", "full", `${ceph.pool}/incremental`),
    ) as { offset: number; length: number }[];
    const objects = new Set(changed.map(({ offset }) => Math.floor(offset / OBJECT)));
    expect([...objects].sort((a, b) => a - b)).toEqual([0, 3, 8, 9]);
  });

  it("has the names that QEMU's escapes make, in a namespace", async () => {
    const source = rawDisk("disk.raw", noise(MiB));
    await ceph.rbd("namespace", "create", `${ceph.pool}/some:space`);
    const address = `rbd:${ceph.pool}/some\\:space/a\\:b\\=c:conf=${ceph.conf}`;
    await succeeds(["backup", "-q", source, address]);
    await mustRun("qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", source, address);
    expect(await ceph.rbd("ls", "--namespace", "some:space", ceph.pool)).toBe("a:b=c\n");
    await succeeds(["compare", "-q", address, source]);
  });

  it("is refused while another client has it open, locked, or is asked for its snapshot", async () => {
    const source = rawDisk("disk.raw", noise(MiB));
    const target = ceph.address("used");
    await succeeds(["backup", "-q", source, target]);
    await ceph.rbd("lock", "add", `${ceph.pool}/used`, "mine");
    expect(await fails(["backup", "-q", "--force", source, target])).toContain(
      "the image is locked ('mine' of ",
    );
    const [lock] = JSON.parse(await ceph.rbd("lock", "ls", "--format", "json", `${ceph.pool}/used`)) as [
      { locker: string },
    ];
    await ceph.rbd("lock", "rm", `${ceph.pool}/used`, "mine", lock.locker);
    await openElsewhere("used");
    expect(await fails(["backup", "-q", "--force", source, target])).toContain(
      "another client has the image open (127.0.0.1",
    );
    expect(await fails(["backup", "-q", "--force", source, ceph.address("used@s")], 2)).toContain(
      "a snapshot cannot be written",
    );
  });
});

describe("a live backup", () => {
  it("has the disk of T0, with a snapshot made after the flush", async () => {
    const source = await makeDisk(at("disk.qcow2"), noise(9 * MiB + 512));
    const server = await Server.start(folder, [source]);
    const guest = await server.guest(5);
    guest.run();
    await guest.progress(20);
    await guest.pause();
    await guest.dump(at("t0"));
    const limit = ["--rate-limit", "1M"];
    const backup = server.backup(ceph.address("live"), "--target-snapshot", "t0", "--verify", ...limit);
    await backup.started();
    guest.run();
    await guest.progress(60);
    const summary = await backup.release(server);
    expect(summary.captures).toBeGreaterThan(0);
    await guest.pause();
    expect(await guest.verify()).toBe("same");
    await guest.quit();
    await expectImage("live@t0", at("t0"));
    await expectImage("live", at("t0"));
    expect((await server.stop()).code).toBe(0);
  });

  it("of two disks at once may not have one image twice", async () => {
    await mustRun("qemu-img", "create", "-q", "-f", "raw", at("a.raw"), "1M");
    await mustRun("qemu-img", "create", "-q", "-f", "raw", at("b.raw"), "1M");
    const server = await Server.start(folder, [`${at("a.raw")}=a`, `${at("b.raw")}=b`]);
    const other = ceph.address("twice", ":rbd_cache=true");
    const result = await cowcatcher([
      ...["backup", "-q", "--control", server.control, "--disk", "a", "--disk", "b"],
      ...[ceph.address("twice"), other],
    ]);
    expect(result.code).toBe(1);
    expect(result.stderr).toContain("writes there already, as 'rbd:");
    expect(await imageNames()).not.toContain("twice");
    await server.stop();
  });
});

describe("an image as SOURCE", () => {
  it("is read without its holes, also a clone's and one that has no object map", async () => {
    const content = disk(3);
    const source = rawDisk("disk.raw", content);
    const image = `${ceph.pool}/source`;
    const features = ["--image-feature", "layering"];
    await ceph.rbd("import", "--no-progress", "--object-size", "1M", ...features, source, image);
    await ceph.rbd("snap", "create", "--no-progress", `${image}@s`);
    await ceph.rbd("snap", "protect", `${image}@s`);
    await ceph.rbd("clone", `${image}@s`, `${ceph.pool}/clone`);
    // The clone's own data in the parent's hole; a discard within an object of the image itself.
    await mustRun("qemu-io", "-f", "raw", "-c", "write -P 5 15M 64k", ceph.address("clone"));
    await mustRun("qemu-io", "-f", "raw", "-d", "unmap", "-c", "discard 4M 512k", ceph.address("source"));
    for (const name of sampled(["source@s", "source", "clone"], 2)) {
      await succeeds(["backup", "-q", "--force", ceph.address(name), at("copy.raw")]);
      await expectImage(name, at("copy.raw"));
      expect(statSync(at("copy.raw")).blocks * 512, name).toBeLessThan(20 * MiB);
      await succeeds(["backup", "-q", "--force", "-c", "-O", "qcow2", ceph.address(name), at("copy.qcow2")]);
      await expectSame(at("copy.raw"), at("copy.qcow2"));
    }
    await succeeds(["backup", "-q", ceph.address("clone"), ceph.address("from-clone")]);
    await expectImage("from-clone", at("copy.raw"));
    expect(await diffBytes("from-clone")).toBeLessThan(30 * MiB);
  });

  it("is refused while others may write it, but for its snapshots", async () => {
    const source = rawDisk("disk.raw", noise(MiB));
    await succeeds(["backup", "-q", "--target-snapshot", "s", source, ceph.address("running")]);
    await openElsewhere("running");
    const error = await fails(["backup", "-q", ceph.address("running"), at("copy.raw")]);
    expect(error).toContain("another client has the image open");
    expect(error).toContain("give a snapshot of it, IMAGE@SNAP");
    expect(existsSync(at("copy.raw"))).toBe(false);
    await succeeds(["backup", "-q", ceph.address("running@s"), at("copy.raw")]);
    await expectSame(at("copy.raw"), source);
    const same = await fails(
      ["restore", "-q", "--force", ceph.address("running@s"), ceph.address("running")],
      2,
    );
    expect(same).toContain("is source and target at once");
  });

  it("is shown by info and map, as by qemu-img; check and serve refuse it by name", async () => {
    const source = rawDisk("disk.raw", disk());
    const address = ceph.address("shown");
    await succeeds(["backup", "-q", source, address]);
    const info = JSON.parse(await succeeds(["info", "--json", address])) as Record<string, unknown>;
    const theirs = JSON.parse(await mustRun("qemu-img", "info", "--output=json", address)) as Record<
      string,
      unknown
    >;
    for (const key of ["virtual-size", "format", "cluster-size"]) expect(info[key], key).toEqual(theirs[key]);
    const stretches = (text: string): unknown[] =>
      (JSON.parse(text) as Record<string, unknown>[]).map(({ start, length, zero, data }) => ({
        start,
        length,
        zero,
        data,
      }));
    const ours = stretches(await succeeds(["map", "--json", address]));
    expect(ours).toEqual(stretches(await mustRun("qemu-img", "map", "--output=json", "-f", "raw", address)));
    expect(ours.length).toBeGreaterThan(2);
    expect(await fails(["check", address], 63)).toContain("does not support checks");
    expect(await fails(["serve", address, "--socket", at("s")])).toContain("QEMU's own rbd driver");
  });
});

describe("one line says what is wrong", () => {
  const imageIn = (pool: string, rest: string): string => `rbd:${pool}/image:conf=${ceph.conf}${rest}`;

  /** Beside the cluster, as each test has a folder of its own. */
  const keyring = (name: string): string => join(dirname(ceph.conf), `${name}.keyring`);

  beforeAll(async () => {
    await ceph.ceph("auth", "get-or-create", "client.poor", "mon", "allow r", "-o", keyring("poor"));
    await ceph.rbd("create", "-s", "1M", `${ceph.pool}/errors`);
    writeFileSync(keyring("wrong"), "[client.wrong]\nkey = AQBvJGVnAAAAABAAdLmAyTEsk6bQVlE2h3QmAA==\n");
  });

  it.each<[string, () => string, RegExp]>([
    ["no such pool", () => imageIn("nopool", ""), /there is no pool 'nopool' \(see `ceph osd pool ls`\)/],
    [
      "no such image",
      () => imageIn(ceph.pool, ""),
      /there is no image 'rbd-test\/image' \(see `rbd ls` and `rbd snap ls`\)/,
    ],
    ["no such snapshot", () => ceph.address("errors@nosnap"), /there is no image 'rbd-test\/errors@nosnap'/],
    [
      "a user without a key",
      () => imageIn(ceph.pool, ":id=nobody"),
      /cannot connect to Ceph: Ceph does not let client\.nobody in \(see `ceph auth ls`/,
    ],
    [
      "a user with a wrong key",
      () => imageIn(ceph.pool, `:id=wrong:keyring=${keyring("wrong")}`),
      /cannot connect to Ceph: Ceph does not let client\.wrong in \(see `ceph auth ls`/,
    ],
    [
      "a user who may not",
      () => imageIn(ceph.pool, `:id=poor:keyring=${keyring("poor")}`),
      /cannot open the image: the user may not do this \(give it the capabilities of profile rbd\)/,
    ],
    [
      "monitors that do not answer",
      () => imageIn(ceph.pool, ":mon_host=127.0.0.1\\:1:client_mount_timeout=2"),
      /cannot connect to Ceph: no monitor of Ceph's answered in time/,
    ],
    [
      "no such setting",
      () => imageIn(ceph.pool, ":nonsense=1"),
      /Ceph has no setting 'nonsense' that takes '1'/,
    ],
    [
      "no such configuration",
      () => "rbd:p/image:conf=/no/where",
      /^cowcatcher: \/no\/where: cannot read the file that 'conf=' names: no such file or directory$/,
    ],
  ])("%s", async (_, address, expected) => {
    const { code, stderr } = await cowcatcher(["info", address()]);
    expect(stderr.trim()).toMatch(expected);
    expect(stderr.trim().split("\n")).toHaveLength(1);
    expect(code).toBe(stderr.includes("has no setting") ? 2 : 1);
  });

  it("librbd1 is not installed: which package to install", async () => {
    // In a mount namespace of its own the library is an empty file.
    const library = (await mustRun("sh", "-c", "ldconfig -p | sed -n 's/.*librbd.so.1.*=> //p'")).trim();
    const command = `mount --bind /dev/null ${library} && exec ${process.execPath} dist/src/cli/main.js info rbd:p/i:conf=${ceph.conf}`;
    const { code, stderr } = await run("unshare", ["-m", "sh", "-c", command]);
    expect(stderr).toMatch(
      /^cowcatcher: rbd:: Ceph's libraries cannot be loaded: .*install librbd1 \(Debian/s,
    );
    expect(code).toBe(1);
  });
});
