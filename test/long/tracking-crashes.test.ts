// What is believed of a tracked image after real crashes of a real server with a real guest: kill -9, and power cuts.
//
// A power cut: the disk stands on ext4 on a loop device, whose backing file stands on XFS, where a reflink copy of it is
// one instant. The copy is mounted and looked at as by another start of the system. What ext4 has not written is lost; and
// so that this is not always all of it, ranges of the image are written back at random meanwhile, without a sync.
//
// TRACKING_CUTS: power cuts a format (60); TRACKING_KILLS: kills (30). Needs root.
import { execFileSync } from "node:child_process";
import { closeSync, mkdirSync, openSync, readFileSync, rmSync, statSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { libc, POSIX_FADV_DONTNEED } from "../../src/native/libc.js";
import { Random } from "../support/random.js";
import { mustRun, Process, scratchFolder, Server, stopAll, until } from "../support/server.js";
import { GRANULE_BYTES, TrackedImage } from "../support/tracked-image.js";

const MiB = 2 ** 20;
const SIZE = 48 * MiB;
const CUTS = Number(process.env["TRACKING_CUTS"] ?? 60);
const KILLS = Number(process.env["TRACKING_KILLS"] ?? 30);
const DEPTH = 8;
const CHECKPOINTS = 30;
const FORMATS = ["raw", "qcow2"] as const;
const isRoot = process.getuid?.() === 0;

const sleep = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

function startGuest(server: Server, seconds: number): Process {
  return new Process("fio", [
    "--name=guest",
    "--ioengine=nbd",
    `--uri=${server.uri()}`,
    "--rw=randwrite",
    "--bsrange=4k-64k",
    `--iodepth=${DEPTH}`,
    "--fsync=40",
    "--time_based",
    `--runtime=${seconds}`,
    "--randrepeat=0",
    "--allrandrepeat=0",
    "--refill_buffers",
    "--output-format=terse",
  ]);
}

async function makeImage(path: string): Promise<void> {
  const format = path.endsWith(".qcow2") ? "qcow2" : "raw";
  await mustRun("qemu-img", "create", "-q", "-f", format, path, String(SIZE));
}

interface Comparison {
  changed: number;
  reported: number;
  missed: number[];
}

/** The disk as it is against what it was, granule by granule. */
async function compare(tracked: TrackedImage, name: string, then: Buffer): Promise<Comparison> {
  const reported = new Set(await tracked.changes(name));
  const now = new Uint8Array(GRANULE_BYTES);
  let changed = 0;
  const missed: number[] = [];
  for (let granule = 0; granule < SIZE / GRANULE_BYTES; granule++) {
    const offset = granule * GRANULE_BYTES;
    await tracked.image.read(now, 0, GRANULE_BYTES, offset);
    if (then.compare(now, 0, GRANULE_BYTES, offset, offset + GRANULE_BYTES) === 0) continue;
    changed++;
    if (!reported.has(granule)) missed.push(granule);
  }
  return { changed, reported: reported.size, missed };
}

afterAll(stopAll);

describe.skipIf(!isRoot)("power cuts", () => {
  const place = join(tmpdir(), `cowcatcher-power-${process.pid}`);
  const [outer, inner, after] = ["outer", "inner", "after"].map((name) => join(place, name)) as [
    string,
    string,
    string,
  ];
  const mounted: string[] = [];
  const mount = (what: string, where: string): void => {
    mkdirSync(where, { recursive: true });
    execFileSync("mount", ["-o", "loop", what, where]);
    mounted.push(where);
  };
  const unmount = (where: string): void => {
    execFileSync("umount", [where]);
    mounted.splice(mounted.indexOf(where), 1);
  };

  beforeAll(() => {
    mkdirSync(place);
    execFileSync("truncate", ["-s", "6G", join(place, "xfs")]);
    execFileSync("mkfs.xfs", ["-q", "-m", "reflink=1", join(place, "xfs")]);
    mount(join(place, "xfs"), outer);
  });

  afterAll(() => {
    for (const where of [...mounted].reverse()) execFileSync("umount", ["-l", where]);
    rmSync(place, { recursive: true, force: true });
  });

  it.each(FORMATS)("report all that differs from a checkpoint: %s", async (format) => {
    const random = new Random(Date.now() % 1_000_000);
    const ext4 = join(outer, `${format}.ext4`);
    execFileSync("truncate", ["-s", "512M", ext4]);
    execFileSync("mkfs.ext4", ["-q", ext4]);
    mount(ext4, inner);
    const image = join(inner, `disk.${format}`);
    await makeImage(image);
    const folder = scratchFolder();
    const server = await Server.start(folder, [image], { env: { COWCATCHER_BOOT_ID: crypto.randomUUID() } });
    const backup = (name: string): Promise<unknown> =>
      server.backup(join(folder, `${name}.raw`), "-O", "raw", "--checkpoint", name).succeed();
    await backup("c0");
    const guest = startGuest(server, 3600);
    let isOver = false;
    const fd = openSync(image, "r");
    const background = (async () => {
      for (let number = 1; !isOver; number++) {
        await sleep(random.below(1000));
        if (number <= CHECKPOINTS) await backup(`c${number}`);
        for (let pieces = 20; pieces > 0 && !isOver; pieces--) {
          libc?.fadvise(fd, random.below(SIZE), random.below(4 * MiB), POSIX_FADV_DONTNEED);
          await sleep(random.below(30));
        }
      }
    })();
    let [changed, reported, checked] = [0, 0, 0];
    for (let cut = 0; cut < CUTS; cut++) {
      await sleep(random.below(250));
      execFileSync("cp", ["--reflink=always", ext4, `${ext4}.cut`]);
      mount(`${ext4}.cut`, after);
      process.env["COWCATCHER_BOOT_ID"] = crypto.randomUUID();
      const tracked = await TrackedImage.open(join(after, `disk.${format}`));
      const { loss, checkpoints } = tracked.tracker.state;
      expect(loss).toBeNull();
      expect(checkpoints.length).toBeGreaterThan(0);
      // The last ones, whose making the cut may have met, and an old one.
      const looked = new Set([...checkpoints.slice(-2), random.pick(checkpoints)]);
      for (const { name } of looked) {
        const result = await compare(tracked, name, readFileSync(join(folder, `${name}.raw`)));
        expect([cut, name, result.missed]).toEqual([cut, name, []]);
        changed += result.changed;
        reported += result.reported;
        checked++;
      }
      await tracked.close();
      unmount(after);
      rmSync(`${ext4}.cut`);
    }
    delete process.env["COWCATCHER_BOOT_ID"];
    isOver = true;
    await background;
    closeSync(fd);
    guest.kill("SIGKILL");
    await server.stop();
    unmount(inner);
    rmSync(ext4);
    console.log(
      `${format}: ${CUTS} power cuts, ${checked} checkpoints, ${changed} granules had changed, ` +
        `none was missed; ${reported} were reported`,
    );
    expect(changed).toBeGreaterThan(CUTS);
  });
});

describe("kill -9", () => {
  it.each(FORMATS)("reports what was written and nothing else: %s", async (format) => {
    const random = new Random(Date.now() % 1_000_000);
    const folder = scratchFolder();
    const image = join(folder, `disk.${format}`);
    await makeImage(image);
    const first = await TrackedImage.open(image);
    await first.checkpoint("base");
    await first.close();
    const then = Buffer.alloc(SIZE);
    let [changed, extra] = [0, 0];
    for (let kill = 1; kill <= KILLS; kill++) {
      const server = await Server.start(folder, [image]);
      const before = statSync(image).mtimeMs;
      const guest = startGuest(server, 60);
      await until("the guest writes", () => statSync(image).mtimeMs > before);
      await sleep(random.below(600));
      server.process.kill("SIGKILL");
      await server.process.ended;
      guest.kill("SIGKILL");
      await guest.ended;
      for (const name of ["nbd.sock", "control.sock"]) rmSync(join(folder, name), { force: true });
      const tracked = await TrackedImage.open(image);
      const result = await compare(tracked, "base", then);
      expect([kill, result.missed, tracked.tracker.state.loss]).toEqual([kill, [], null]);
      // Bits come before data: what was in flight may have one of them alone.
      extra = result.reported - result.changed;
      expect(extra).toBeLessThanOrEqual(2 * DEPTH * kill);
      changed = result.changed;
      await tracked.close();
    }
    console.log(
      `${format}: ${KILLS} kills, ${changed} granules had changed, none was missed; ${extra} in flight`,
    );
    expect(changed).toBeGreaterThan(KILLS);
  });
});
