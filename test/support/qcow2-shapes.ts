// qcow2 images with every feature that qemu-img 7.2 can give them, made by qemu-img and qemu-io: one list for the
// fuzzer's seeds and for the table of features and operations. Contents are small, so that a whole image is read in
// a few milliseconds, and the same each time.

import { execFileSync } from "node:child_process";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { KiB, MiB } from "../../src/units.js";
import { randomFrom } from "./qcow2-memory.js";

/** What an image asks of a reader beyond plain clusters. */
export type ShapeNeed = "extended-l2" | "data-file";

export interface Qcow2Shape {
  name: string;
  /** As -o of qemu-img create. */
  options: string;
  clusterBytes: number;
  sizeBytes: number;
  /** A chain below: its bottom first, each on the one before. */
  backing?: readonly Layer[];
  /** The first content is compressed by qemu-img convert -c. */
  convertCompressed?: boolean;
  /** Written by qemu-io after a snapshot each. */
  snapshots?: readonly string[];
  bitmaps?: readonly string[];
  /** Nothing is written by qemu-io: the image stays as it was created. */
  isEmpty?: boolean;
  needs?: readonly ShapeNeed[];
}

interface Layer {
  format: "raw" | "qcow2";
  sizeBytes: number;
  options?: string;
}

const SMALL = 1 * MiB;

function shape(
  name: string,
  options: string,
  clusterBytes: number,
  more: Partial<Qcow2Shape> = {},
): Qcow2Shape {
  return {
    name,
    options: `cluster_size=${clusterBytes},${options}`,
    clusterBytes,
    sizeBytes: SMALL,
    ...more,
  };
}

/** The images, each named after what is special about it. */
export const QCOW2_SHAPES: readonly Qcow2Shape[] = [
  shape("v3-64k", "compat=1.1", 64 * KiB),
  shape("v2-64k", "compat=0.10", 64 * KiB),
  shape("v3-512", "compat=1.1", 512, { sizeBytes: 200 * KiB }),
  shape("v2-512", "compat=0.10", 512, { sizeBytes: 200 * KiB }),
  shape("v3-4k", "compat=1.1", 4 * KiB),
  shape("v2-4k", "compat=0.10", 4 * KiB),
  shape("v3-2m", "compat=1.1", 2 * MiB, { sizeBytes: 7 * MiB }),
  shape("empty", "compat=1.1", 64 * KiB, { isEmpty: true }),
  shape("no-size", "compat=1.1", 64 * KiB, { isEmpty: true, sizeBytes: 0 }),
  shape("zlib", "compat=1.1", 64 * KiB, { convertCompressed: true }),
  shape("zlib-v2-4k", "compat=0.10", 4 * KiB, { convertCompressed: true }),
  shape("zstd", "compat=1.1,compression_type=zstd", 64 * KiB, { convertCompressed: true }),
  shape("zstd-4k", "compat=1.1,compression_type=zstd", 4 * KiB, { convertCompressed: true }),
  shape("odd-size", "compat=1.1", 64 * KiB, { sizeBytes: SMALL - 65 * KiB - 512 }),
  shape("odd-size-512", "compat=1.1", 4 * KiB, { sizeBytes: 100 * KiB + 512 }),
  shape("on-raw", "compat=1.1", 64 * KiB, { backing: [{ format: "raw", sizeBytes: SMALL }] }),
  shape("on-short-raw", "compat=1.1", 64 * KiB, { backing: [{ format: "raw", sizeBytes: 300 * KiB + 512 }] }),
  shape("on-odd-raw", "compat=1.1", 4 * KiB, { backing: [{ format: "raw", sizeBytes: 300 * KiB + 1537 }] }),
  shape("on-long-qcow2", "compat=0.10", 4 * KiB, { backing: [{ format: "qcow2", sizeBytes: 2 * SMALL }] }),
  shape("deep-chain", "compat=1.1", 16 * KiB, {
    backing: [
      { format: "raw", sizeBytes: 500 * KiB },
      { format: "qcow2", sizeBytes: SMALL, options: "cluster_size=4k" },
      { format: "qcow2", sizeBytes: 700 * KiB, options: "compat=0.10" },
      { format: "qcow2", sizeBytes: SMALL + 512, options: "cluster_size=512" },
      { format: "qcow2", sizeBytes: SMALL },
    ],
  }),
  shape("snapshots", "compat=1.1", 64 * KiB, { snapshots: ["one", "two"] }),
  shape("snapshots-v2-512", "compat=0.10", 512, { sizeBytes: 100 * KiB, snapshots: ["one", "two"] }),
  shape("snapshots-zlib", "compat=1.1", 4 * KiB, { snapshots: ["one"], convertCompressed: true }),
  shape("lazy", "compat=1.1,lazy_refcounts=on", 64 * KiB),
  shape("refcount-1", "compat=1.1,refcount_bits=1", 4 * KiB),
  shape("refcount-2", "compat=1.1,refcount_bits=2", 4 * KiB, { snapshots: ["one"] }),
  shape("refcount-8", "compat=1.1,refcount_bits=8", 4 * KiB, { snapshots: ["one"] }),
  shape("refcount-32", "compat=1.1,refcount_bits=32", 4 * KiB),
  shape("refcount-64", "compat=1.1,refcount_bits=64", 512, { sizeBytes: 200 * KiB, snapshots: ["one"] }),
  shape("bitmaps", "compat=1.1", 64 * KiB, { bitmaps: ["first", "second"] }),
  shape("bitmaps-512", "compat=1.1", 512, { sizeBytes: 200 * KiB, bitmaps: ["b"] }),
  shape("metadata", "compat=1.1,preallocation=metadata", 64 * KiB),
  shape("falloc", "compat=1.1,preallocation=falloc", 64 * KiB),
  shape("full", "compat=1.1,preallocation=full", 4 * KiB),
  shape("extended-l2", "compat=1.1,extended_l2=on", 64 * KiB, { needs: ["extended-l2"] }),
  shape("extended-l2-16k", "compat=1.1,extended_l2=on", 16 * KiB, {
    needs: ["extended-l2"],
    snapshots: ["one"],
    backing: [{ format: "raw", sizeBytes: SMALL - 100 * KiB }],
  }),
  shape("extended-l2-zlib", "compat=1.1,extended_l2=on", 64 * KiB, {
    needs: ["extended-l2"],
    convertCompressed: true,
  }),
  shape("data-file", "compat=1.1,data_file=data.img", 64 * KiB, { needs: ["data-file"] }),
  shape("data-file-raw", "compat=1.1,data_file=data.img,data_file_raw=on", 64 * KiB, {
    needs: ["data-file"],
  }),
  shape("data-file-extended-l2", "compat=1.1,extended_l2=on,data_file=data.img", 64 * KiB, {
    needs: ["data-file", "extended-l2"],
  }),
];

export const IMAGE_NAME = "image.qcow2";

function qemuImg(folder: string, ...args: string[]): void {
  execFileSync("qemu-img", args, { cwd: folder, stdio: ["ignore", "ignore", "pipe"] });
}

function qemuIo(folder: string, image: string, commands: readonly string[]): void {
  const args = commands.flatMap((command) => ["-c", command]);
  // Discards must reach the image whatever the default of qemu-io is.
  execFileSync("qemu-io", ["-d", "unmap", "-f", "qcow2", ...args, image], { cwd: folder, stdio: "ignore" });
}

/** Half of it text, noise and zeroes in turn, by blocks of 512 bytes, so that compression has something to do. */
export function mixedContent(sizeBytes: number, seed: number): Buffer {
  const random = randomFrom(seed);
  const bytes = Buffer.alloc(sizeBytes);
  for (let at = 0; at < sizeBytes; at += 512) {
    const end = Math.min(sizeBytes, at + 512);
    const kind = random(3);
    if (kind === 1) bytes.fill(`block ${at} `, at, end);
    else if (kind === 2) for (let index = at; index < end; index++) bytes[index] = random(256);
  }
  return bytes;
}

/** Makes IMAGE_NAME and what it stands on in the folder. */
export function makeShape(folder: string, wanted: Qcow2Shape): string {
  const { options, sizeBytes, backing, convertCompressed } = wanted;
  const below = backing === undefined ? [] : makeChain(folder, backing);
  if (convertCompressed) {
    writeFileSync(join(folder, "content.raw"), mixedContent(sizeBytes, 3));
    qemuImg(folder, "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, "content.raw", IMAGE_NAME);
  } else {
    qemuImg(folder, "create", "-q", "-f", "qcow2", "-o", options, ...below, IMAGE_NAME, `${sizeBytes}`);
  }
  if (!wanted.isEmpty) {
    qemuIo(folder, IMAGE_NAME, ioCommands(wanted));
    for (const [index, name] of (wanted.snapshots ?? []).entries()) {
      qemuImg(folder, "snapshot", "-c", name, IMAGE_NAME);
      qemuIo(folder, IMAGE_NAME, laterCommands(wanted, index));
    }
  }
  for (const name of wanted.bitmaps ?? []) {
    qemuImg(folder, "bitmap", "--add", "-g", "64k", IMAGE_NAME, name);
    qemuIo(folder, IMAGE_NAME, laterCommands(wanted, 7));
  }
  return join(folder, IMAGE_NAME);
}

/** QEMU compresses only into clusters that are not there yet; 2-bit refcounts cannot count what shares a cluster. */
function canCompress({ options, convertCompressed, needs }: Qcow2Shape): boolean {
  return (
    !convertCompressed && !needs?.includes("data-file") && !/preallocation|refcount_bits=2/.test(options)
  );
}

function makeChain(folder: string, layers: readonly Layer[]): string[] {
  let below: string[] = [];
  for (const [index, { format, sizeBytes, options }] of layers.entries()) {
    const name = `base${index}.${format}`;
    if (format === "raw") {
      writeFileSync(join(folder, name), mixedContent(sizeBytes, 10 + index));
    } else {
      const chosen = options === undefined ? [] : ["-o", options];
      qemuImg(folder, "create", "-q", "-f", "qcow2", ...chosen, ...below, name, `${sizeBytes}`);
      const at = index * 96 * KiB + 5 * KiB;
      qemuIo(folder, name, [
        `write -P ${64 + index} ${at} 70k`,
        `write -z ${at + 130 * KiB} 66k`,
        `write -P ${32 + index} ${Math.min(sizeBytes - 1024, 660 * KiB)} 1k`,
      ]);
    }
    below = ["-b", name, "-F", format];
  }
  return below;
}

/** A bit of everything, by clusters where that matters and across their borders where it does not. */
function ioCommands(wanted: Qcow2Shape): string[] {
  const { clusterBytes: c, sizeBytes, convertCompressed } = wanted;
  const commands: string[] = [];
  const clusters = Math.floor(sizeBytes / c);
  const at = (cluster: number): number => (cluster % clusters) * c;
  const part = Math.min(c / 2, 24 * KiB);
  if (!convertCompressed) {
    commands.push(`write -P 1 0 ${Math.min(2, clusters) * c}`);
    commands.push(`write -P 2 ${at(3) + part} ${part}`);
    if (clusters > 4) commands.push(`write -P 3 ${at(4)} ${c}`);
  }
  if (clusters > 9 && canCompress(wanted)) {
    for (let index = 6; index < 9; index++) commands.push(`write -c -P ${index} ${at(index)} ${c}`);
  }
  if (clusters > 12) {
    commands.push(`write -P 4 ${at(10)} ${2 * c}`, `write -z ${at(10)} ${c}`, `write -z -u ${at(11)} ${c}`);
    commands.push(`write -P 5 ${at(13)} ${c}`, `discard ${at(13)} ${c}`, `write -z ${at(14)} ${c}`);
  } else if (clusters > 2) {
    commands.push(`write -z ${at(2)} ${c}`);
  }
  const tail = Math.min(3 * KiB, sizeBytes);
  commands.push(`write -P 9 ${sizeBytes - tail} ${tail}`, "flush");
  return commands;
}

function laterCommands({ clusterBytes: c, sizeBytes }: Qcow2Shape, index: number): string[] {
  const part = Math.min(c / 2, 8 * KiB);
  const at = Math.min((index + 1) * c + part, sizeBytes - part);
  const commands = [`write -P ${40 + index} ${at} ${part}`];
  if (sizeBytes > (6 + index) * c) commands.push(`discard ${(5 + index) * c} ${c}`);
  return commands;
}
