// An image whose file was cut short is not opened for writing: it would grow, and what it had lost be inside its file
// again, as zeroes. What only looks like it, a leak behind the end, is no reason.

import {
  mkdtempSync,
  openSync,
  readFileSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
  writeSync,
  closeSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, expect, it } from "vitest";
import { openImage } from "../../../src/image/open.js";
import { expectClean } from "../../support/disks.js";
import { mustRun } from "../../support/server.js";

const CLUSTER = 65536;
let folder: string;
let image: string;

beforeEach(async () => {
  folder = mkdtempSync(join(tmpdir(), "cowcatcher-lost-"));
  image = join(folder, "disk.qcow2");
  await mustRun("qemu-img", "create", "-q", "-f", "qcow2", image, "4M");
});
afterEach(() => rmSync(folder, { recursive: true, force: true }));

const qemuIo = (...commands: string[]): Promise<string> =>
  mustRun("qemu-io", ...commands.flatMap((command) => ["-c", command]), image);

async function expectRefused(): Promise<void> {
  const before = readFileSync(image);
  await expect(openImage(image, { readOnly: false })).rejects.toMatchObject({
    code: "FORMAT",
    object: image,
    problem: expect.stringMatching(/cut short/) as string,
  });
  expect(readFileSync(image).equals(before)).toBe(true);
}

/** The host offset of the cluster at `guestOffset`, as QEMU maps it. */
async function hostOffsetOf(guestOffset: number): Promise<number> {
  const map = JSON.parse(await mustRun("qemu-img", "map", "--output=json", image)) as {
    start: number;
    length: number;
    offset?: number;
  }[];
  const run = map.find(({ start, length }) => start <= guestOffset && guestOffset < start + length);
  if (run?.offset === undefined) throw new Error(`${guestOffset} is not mapped`);
  return run.offset + guestOffset - run.start;
}

it("with a lost data cluster, a lost half of them, a lost L2 table", async () => {
  await qemuIo("write -q -P 1 0 1M");
  const whole = readFileSync(image);
  const l2 = Number(whole.readBigUInt64BE(Number(whole.readBigUInt64BE(40))) & 0x00ff_ffff_ffff_ffffn);
  for (const end of [whole.length - CLUSTER, whole.length / 2, l2 + CLUSTER, l2 + 512]) {
    writeFileSync(image, whole);
    truncateSync(image, end - (end % 512));
    await expectRefused();
  }
});

it("with lost compressed data", async () => {
  const raw = join(folder, "raw");
  const content = Buffer.alloc(1 << 20);
  for (let i = 0; i < content.length; i += 3) content[i] = (i * 2654435761) >>> 24;
  writeFileSync(raw, content);
  await mustRun("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, image);
  truncateSync(image, statSync(image).size - 2 * CLUSTER);
  await expectRefused();
});

it("with lost clusters that only a snapshot has", async () => {
  // The snapshot's tables find room in what is discarded first, before the data that it alone has afterwards.
  await qemuIo("write -q -P 1 0 1M", "discard -q 0 512k");
  await mustRun("qemu-img", "snapshot", "-c", "s", image);
  const last = await hostOffsetOf(1024 * 1024 - CLUSTER);
  await qemuIo("discard -q 512k 512k");
  expect(statSync(image).size).toBeGreaterThan(last);
  truncateSync(image, last);
  await expectRefused();
});

it("opens one with a leak behind its end, and one whose last cluster is stored in part", async () => {
  await qemuIo("write -q -P 1 0 64k", "write -q -P 2 64k 64k");
  const host = await hostOffsetOf(CLUSTER);
  expect(host + CLUSTER).toBe(statSync(image).size);
  truncateSync(image, host + 5 * 512);
  const partly = await openImage(image, { readOnly: false });
  const bytes = new Uint8Array(CLUSTER);
  await partly.read(bytes, 0, CLUSTER, CLUSTER);
  await partly.close();
  expect(
    bytes.subarray(0, 2560).every((byte) => byte === 2) && bytes.subarray(2560).every((byte) => byte === 0),
  ).toBe(true);

  // The entry that named it goes: a leak, and none of it is in the file.
  const whole = readFileSync(image);
  const l2 = Number(whole.readBigUInt64BE(Number(whole.readBigUInt64BE(40))) & 0x00ff_ffff_ffff_ffffn);
  const fd = openSync(image, "r+");
  writeSync(fd, Buffer.alloc(8), 0, 8, l2 + 8);
  closeSync(fd);
  truncateSync(image, host);
  const leaky = await openImage(image, { readOnly: false });
  await leaky.write(Buffer.alloc(CLUSTER, 7), 0, CLUSTER, 2 * CLUSTER);
  await leaky.flush();
  await leaky.close();
  await qemuIo("read -q -P 1 0 64k", "read -q -P 0 64k 64k", "read -q -P 7 128k 64k");
  await mustRun("qemu-img", "check", "-q", "-r", "leaks", image);
  await expectClean(image);
});
