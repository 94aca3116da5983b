// What discards and write-zeroes leave of a qcow2 image, with QEMU as judge: the same commands by qemu-io on QEMU's own
// image and on ours through the server, then qemu-img map of both. After iotests 154 (partial clusters over a backing
// file), 046 and 244 (data files) of qemu/qemu.
import { copyFileSync, mkdirSync, statSync } from "node:fs";
import { dirname, join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { mustRun, scratchFolder, Server, stopAll } from "../../support/server.js";

const KiB = 1024;
const MiB = 1024 * KiB;
let folder: string;

beforeAll(() => {
  // A file system with holes of 4 KiB.
  folder = scratchFolder("/tmp");
});
afterAll(stopAll);

type Make = (image: string) => Promise<unknown>;

function create(options: string, size: string): Make {
  return (image) => mustRun("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, size);
}

async function io(image: string, ...commands: string[]): Promise<void> {
  const args = commands.flatMap((command) => ["-c", command]);
  await mustRun("qemu-io", "-d", "unmap", "-f", image.includes("nbd+unix") ? "raw" : "qcow2", ...args, image);
}

interface Extent {
  start: number;
  length: number;
  depth: number;
  present: boolean;
  zero: boolean;
  data: boolean;
}

async function mapOf(image: string): Promise<Extent[]> {
  const text = await mustRun("qemu-img", "map", "--output=json", "-f", "qcow2", image);
  const merged: Extent[] = [];
  for (const { start, length, depth, present, zero, data } of JSON.parse(text) as Extent[]) {
    const last = merged.at(-1);
    // Where the clusters stand in the file is each writer's own business.
    const isSame =
      last?.depth === depth && last.present === present && last.zero === zero && last.data === data;
    if (isSame) last.length += length;
    else merged.push({ start, length, depth, present, zero, data });
  }
  return merged;
}

async function expectAsQemu(name: string, make: Make, ...commands: string[]): Promise<string> {
  const places = ["theirs", "ours"].map((who) => join(folder, name.replace(/\W+/g, "-"), who, "disk.qcow2"));
  const [theirs = "", ours = ""] = places;
  for (const place of places) {
    mkdirSync(dirname(place), { recursive: true });
    await make(place);
  }
  await io(theirs, ...commands);
  const server = await Server.start(dirname(ours), [ours]);
  await io(server.uri(), ...commands);
  expect((await server.stop()).code).toBe(0);
  expect(await mapOf(ours)).toEqual(await mapOf(theirs));
  await mustRun("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", theirs, ours);
  await mustRun("qemu-img", "check", "-q", "-f", "qcow2", ours);
  return ours;
}

/** An overlay with clusters of 4 KiB on a base that has data at 32K to 40K, and zero clusters at 48K. */
function overlay(options: string, baseFormat: "qcow2" | "raw", baseSize = "128K", size = "128K"): Make {
  return async (image) => {
    const base = join(dirname(image), `base.${baseFormat}`);
    const baseOptions = baseFormat === "qcow2" ? ["-o", "cluster_size=4k"] : [];
    await mustRun("qemu-img", "create", "-q", "-f", baseFormat, ...baseOptions, base, baseSize);
    const commands = ["-c", "write -P 10 32k 8k", "-c", "write -P 11 41k 1k"];
    await mustRun("qemu-io", "-f", baseFormat, ...commands, base);
    const args = ["-f", "qcow2", "-F", baseFormat, "-b", base, "-o", options, image, size];
    await mustRun("qemu-img", "create", "-q", ...args);
  };
}

describe("part of a cluster becomes zero as a whole where the backing file is zero around it", () => {
  const commands = [
    "write -z 1k 1k",
    "write -z -u 8k 2k",
    "write -z 14k 4k",
    "write -z 31k 2k",
    "write -z 40k 1k",
    "write -z 42k 2k",
    "write -P 7 60k 1k",
    "write -z 61k 1k",
    "write -z 127k 1k",
  ];
  it.each(["qcow2", "raw"] as const)("over %s", async (format) => {
    await expectAsQemu(`part-${format}`, overlay("cluster_size=4k", format), ...commands);
  });

  it("with a backing file that ends inside the cluster, and with subclusters", async () => {
    const short = overlay("cluster_size=4k", "raw", "66K");
    await expectAsQemu("part-short", short, "write -z 64k 1k", "write -z 65k 1k", "write -z 67k 1k");
    const subclusters = overlay("extended_l2=on,cluster_size=128k", "raw");
    await expectAsQemu("part-subclusters", subclusters, ...commands);
  });

  it("not in version 2, which has no zero clusters", async () => {
    await expectAsQemu(
      "part-v2",
      overlay("compat=0.10,cluster_size=4k", "raw"),
      "write -z 1k 1k",
      "write -z 33k 1k",
    );
  });
});

describe("what the backing file alone provides is gone after a discard", () => {
  it.each(["0 1M", "64k 64k", "32k 96k", "3M 1M"])("discard %s", async (range) => {
    await expectAsQemu(`trim-${range}`, overlay("cluster_size=64k", "raw", "4M", "4M"), `discard ${range}`);
  });

  it("but not in version 2, where it would show through again", async () => {
    await expectAsQemu("trim-v2", overlay("compat=0.10", "raw", "4M", "4M"), "discard 0 1M");
  });
});

describe("a raw external data file", () => {
  const commands = [
    "write -P 1 0 1M",
    "discard 0 256k",
    "write -z 256k 128k",
    "write -z -u 512k 128k",
    "write -z 700k 1k",
  ];
  it.each(["on", "off"])("has zero clusters where the guest has zeroed: data_file_raw=%s", async (isRaw) => {
    const make: Make = (image) => create(`data_file=${image}.data,data_file_raw=${isRaw}`, "2M")(image);
    const ours = await expectAsQemu(`data-${isRaw}`, make, ...commands);
    // And the file itself reads as the disk.
    if (isRaw === "on")
      await mustRun("qemu-img", "compare", "-f", "qcow2", "-F", "raw", ours, `${ours}.data`);
  });

  it("takes a guest's writes to what was zeroed", async () => {
    const make: Make = (image) => create(`data_file=${image}.data,data_file_raw=on`, "2M")(image);
    const again = [...commands, "write -P 2 64k 4k", "write -P 3 256k 64k", "write -P 4 600k 1k"];
    const ours = await expectAsQemu("data-again", make, ...again);
    await mustRun("qemu-img", "compare", "-f", "qcow2", "-F", "raw", ours, `${ours}.data`);
  });
});

describe("trimmed clusters", () => {
  /** Bytes on the disk. */
  const storedIn = (image: string): number => statSync(image).blocks * 512;

  it("give their storage back, as with QEMU", async () => {
    const ours = await expectAsQemu(
      "punched",
      create("cluster_size=64k", "64M"),
      "write -P 1 0 8M",
      "flush",
      "discard 1M 4M",
      "write -z -u 6M 1M",
      "flush",
    );
    const theirs = ours.replace("/ours/", "/theirs/");
    expect(storedIn(ours)).toBeLessThan(storedIn(theirs) + MiB);
    expect(storedIn(ours)).toBeLessThan(5 * MiB);
  });

  it("keep it while a snapshot shares them, and are used again", async () => {
    const make: Make = async (image) => {
      await create("cluster_size=64k", "64M")(image);
      await mustRun("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 4M", image);
      await mustRun("qemu-img", "snapshot", "-c", "one", image);
    };
    const ours = await expectAsQemu(
      "shared",
      make,
      "write -P 2 0 2M",
      "discard 0 4M",
      "flush",
      "write -P 3 1M 3M",
      "flush",
    );
    copyFileSync(ours, `${ours}.copy`);
    await mustRun("qemu-img", "snapshot", "-a", "one", `${ours}.copy`);
    await mustRun("qemu-io", "-f", "qcow2", "-c", "read -P 1 0 4M", `${ours}.copy`);
  });
});
