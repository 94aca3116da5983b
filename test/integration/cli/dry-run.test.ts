// `backup --dry-run` says what `qemu-img measure` says, and writes nothing.

import { readdirSync, truncateSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, expect, it } from "vitest";
import { measureTarget } from "../../../src/backup/job/measure.js";
import { openImage } from "../../../src/image/open.js";
import { GiB, KiB, MiB, TiB } from "../../../src/units.js";
import { cowcatcher, type RunResult } from "../../support/cli.js";
import { formatOf } from "../../support/disks.js";
import { mustRun, scratchFolder, stopAll } from "../../support/server.js";

let folder: string;
beforeAll(async () => {
  folder = scratchFolder();
  const make = (name: string, ...args: string[]): Promise<unknown> =>
    mustRun(
      "qemu-img",
      "create",
      "-q",
      "-f",
      formatOf(name),
      ...args.slice(0, -1),
      at(name),
      args.at(-1) ?? "",
    );
  const write = (name: string, ...commands: string[]): Promise<unknown> =>
    mustRun("qemu-io", "-f", formatOf(name), ...commands.flatMap((c) => ["-c", c]), at(name));
  for (const [name, bytes] of [
    ["empty.raw", 0],
    ["odd.raw", 1000],
    ["holes.raw", 10 * MiB + 512],
    ["huge.raw", 3 * TiB],
  ] as const) {
    writeFileSync(at(name), "");
    truncateSync(at(name), bytes);
  }
  await write("holes.raw", "write 1M 5k", "write 3000k 1100k", "write 10M 512");
  await write("huge.raw", "write 0 64k", "write 2T 1M");
  await make("v3.qcow2", "100M");
  await write(
    "v3.qcow2",
    "write 0 70k",
    "write 5M 3M",
    "write -z 6M 1M",
    "write -z 50M 1M",
    "discard 7M 64k",
  );
  await make("overlay.qcow2", "-b", "v3.qcow2", "-F", "qcow2", "120M");
  await write("overlay.qcow2", "write 5500k 100k", "write -z 0 64k", "write 110M 1M");
  await make("small.qcow2", "-o", "cluster_size=4k", "20M");
  await write("small.qcow2", "write 4k 4k", "write 1M 333k");
  await mustRun("qemu-img", "convert", "-c", "-O", "qcow2", at("v3.qcow2"), at("compressed.qcow2"));
});
afterAll(stopAll);

const at = (name: string): string => join(folder, name);
const dryRun = (...args: string[]): Promise<RunResult> =>
  cowcatcher(["backup", "--dry-run", ...args], { cwd: folder });

interface Measured {
  required: number;
  "fully-allocated": number;
}

async function measured(source: string, ...args: string[]): Promise<Measured> {
  const stdout = await mustRun(
    ...(["qemu-img", "measure", "--output=json", "-f", formatOf(source), ...args, at(source)] as const),
  );
  const { required, "fully-allocated": full } = JSON.parse(stdout) as Measured;
  return { required, "fully-allocated": full };
}

const SOURCES = [
  ...["empty.raw", "odd.raw", "holes.raw", "huge.raw"],
  ...["v3.qcow2", "overlay.qcow2", "small.qcow2", "compressed.qcow2"],
];

it.each(SOURCES)("%s, to raw and to qcow2 with every size of cluster", async (source) => {
  const image = await openImage(at(source), { format: formatOf(source), readOnly: true });
  const path = "t";
  for (const clusterSizeBytes of [512, 4 * KiB, 64 * KiB, 256 * KiB, 2 * MiB]) {
    // qemu-img refuses these too.
    if (image.sizeBytes > 128 * GiB && clusterSizeBytes === 512) continue;
    const format = "qcow2";
    const ours = await measureTarget(image, {
      path,
      format,
      clusterSizeBytes,
      hasBacking: false,
      topOnly: false,
    });
    const theirs = await measured(source, "-O", "qcow2", "-o", `cluster_size=${clusterSizeBytes}`);
    expect([clusterSizeBytes, ours.requiredBytes, ours.fullyAllocatedBytes]).toEqual([
      ...[clusterSizeBytes, theirs.required, theirs["fully-allocated"]],
    ]);
  }
  const raw = { path, format: "raw", clusterSizeBytes: 64 * KiB, hasBacking: false, topOnly: false } as const;
  const ours = await measureTarget(image, raw);
  const theirs = await measured(source, "-O", "raw");
  expect([ours.requiredBytes, ours.fullyAllocatedBytes]).toEqual([
    theirs.required,
    theirs["fully-allocated"],
  ]);
  await image.close();
});

it("prints both, and leaves the folder as it was", async () => {
  const before = readdirSync(folder);
  const json = await dryRun("--json", "v3.qcow2", "t.qcow2");
  expect(JSON.parse(json.stdout)).toMatchObject(await measured("v3.qcow2", "-O", "qcow2"));
  const { required, "fully-allocated": full } = await measured("holes.raw", "-O", "qcow2");
  const text = await dryRun("-c", "holes.raw", "t.qcow2");
  expect(text).toEqual({
    code: 0,
    stdout: expect.stringMatching(
      `^required size: ${required}\nfully allocated size: ${full}\nfree size: \\d+\n$`,
    ) as string,
    stderr: "",
  });
  expect(readdirSync(folder)).toEqual(before);
});

it("fails as the backup would", async () => {
  const cases = [
    [["odd.raw", "v3.qcow2"], "v3.qcow2: exists already (--force overwrites it)"],
    [["odd.raw", "null:"], "--dry-run: null: stores nothing (name a target)"],
    [["none.raw", "t.qcow2"], "none.raw: cannot"],
    [["-b", "none.qcow2", "-B", "qcow2", "odd.raw", "t.qcow2"], "none.qcow2: cannot"],
    [
      [
        "--bitmap",
        "none",
        "--bitmap-mode",
        "never",
        "-b",
        "v3.qcow2",
        "-B",
        "qcow2",
        "small.qcow2",
        "t.qcow2",
      ],
      "small.qcow2: has no bitmap 'none'",
    ],
    [["-c", "odd.raw", "t.bin"], "--compress: a raw target cannot be compressed (give -O qcow2)"],
    [
      ["--cluster-size", "512", "huge.raw", "t.qcow2"],
      "t.qcow2: a qcow2 image with clusters of 512 B holds at most 128 GiB (choose larger clusters, such as 64K)",
    ],
  ] as const;
  for (const [args, message] of cases) {
    const { code, stderr } = await dryRun(...args);
    expect(stderr).toContain(`cowcatcher: ${message}`);
    expect(code).toBeGreaterThan(0);
  }
});
