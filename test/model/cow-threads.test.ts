// The engine as it ships, real worker threads and a real file, under a guest in this process that writes as fast as
// it can. What the simulation (cow.test.ts) cannot show, this can: that memory order and wake-ups hold between
// threads. It needs the built program in dist, as the workers are loaded from there.
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, test } from "vitest";
import type { LiveHost as LiveHostType } from "../../src/backup/job/live-host.js";
import { JOB_DEFAULTS, type JobOptions } from "../../src/backup/options.js";
import type { DiskNode as DiskNodeType } from "../../src/cow/disk-node.js";
import type { openImage as openImageType } from "../../src/image/open.js";
import { IS_CAMPAIGN } from "../support/campaign.js";
import { Random } from "../support/random.js";

const dist = new URL(process.env["COWCATCHER_DIST"] ?? "../../dist/", import.meta.url);
const load = async <T>(path: string): Promise<T> => (await import(new URL(path, dist).href)) as T;
const { LiveHost } = await load<{ LiveHost: typeof LiveHostType }>("src/backup/job/live-host.js");
const { DiskNode } = await load<{ DiskNode: typeof DiskNodeType }>("src/cow/disk-node.js");
const { openImage } = await load<{ openImage: typeof openImageType }>("src/image/open.js");

const directory = mkdtempSync(join(tmpdir(), "cow-threads-"));
afterAll(() => rmSync(directory, { recursive: true, force: true }));

const MiB = 1024 * 1024;
const ROUNDS = IS_CAMPAIGN ? 100 : 12;

interface Round {
  sizeBytes: number;
  options: JobOptions;
}

function roundOf(seed: number, target: string): Round {
  const random = new Random(seed);
  const sizeBytes = (2 + random.below(14)) * MiB + random.pick([0, 512, 4097]);
  const options: JobOptions = {
    ...JOB_DEFAULTS,
    target,
    targetFormat: random.pick(["raw", "qcow2"]),
    workerCount: random.pick([1, 2, 4, 8]),
    cowBufferSizeBytes: random.pick([0, 2 * MiB, 64 * MiB]),
    onBufferFull: random.pick(["spill", "wait"]),
    rateLimitBytes: random.pick([0, 40 * MiB]),
  };
  return { sizeBytes, options };
}

/** Writes at random until `stop`, keeping a model of the disk; yields to the event loop now and then. */
async function runGuest(
  node: DiskNodeType,
  model: Buffer,
  random: Random,
  stopped: () => boolean,
): Promise<number> {
  let writes = 0;
  while (!stopped()) {
    const length = 1 + random.below(random.pick([512, 4096, 65_536, 3 * MiB]));
    const offset = random.below(Math.max(1, model.length - length));
    const end = Math.min(model.length, offset + length);
    const zeroes = random.chance(0.1);
    const data = new Uint8Array(end - offset).fill(zeroes ? 0 : 1 + random.below(255));
    const completion = zeroes
      ? node.writeZeroes(offset, end - offset, { mayUnmap: random.chance(0.5) })
      : node.write(data, 0, end - offset, offset);
    if (completion) await completion;
    model.set(data, offset);
    if (++writes % 8 === 0) await new Promise((resolve) => setImmediate(resolve));
  }
  return writes;
}

describe("over real threads", () => {
  test.each(Array.from({ length: ROUNDS }, (_, i) => i + 1))(
    "round %i: target as at T0, disk as written",
    async (seed) => {
      const random = new Random(seed * 7919);
      const path = join(directory, `disk-${seed}.raw`);
      const { sizeBytes, options } = roundOf(seed, join(directory, `target-${seed}`));
      const model = Buffer.alloc(sizeBytes);
      for (let at = 0; at < sizeBytes; at += 4096) {
        model.fill(random.pick([0, random.below(256)]), at, Math.min(at + 4096, sizeBytes));
      }
      writeFileSync(path, model);

      const image = await openImage(path, { format: "raw", readOnly: false });
      const node = new DiskNode("disk", image);
      const host = new LiveHost(new Map([["disk", node]]), () => {});
      let t0: Buffer | null = null;
      let concluded = false;
      host.onStatus((_job, status) => {
        // Within the step that is T0, so no write can come between.
        if (status === "running") t0 = readFileSync(path);
        if (status === "concluded") concluded = true;
      });
      const guest = runGuest(node, model, random, () => concluded);
      const [job] = await host.startBackups([{ id: "job", disk: "disk", options }]);
      const writes = await guest;
      expect(job?.error).toBeUndefined();
      expect(writes).toBeGreaterThan(0);
      const progress = job?.progress();
      expect(progress).toMatchObject({ bytesDone: sizeBytes, bytesTotal: sizeBytes, bufferBytesUsed: 0 });

      const target = await openImage(options.target, { format: options.targetFormat, readOnly: true });
      const copy = new Uint8Array(sizeBytes);
      await target.read(copy, 0, sizeBytes, 0);
      await target.close();
      await host.close();
      await image.close();
      expect(Buffer.compare(copy, t0 as unknown as Buffer)).toBe(0);
      expect(Buffer.compare(readFileSync(path), model)).toBe(0);
    },
  );
});
