// Random damage to refcounts and flags, a repair, and crashes in the middle of it.
//
// The mapping is left alone (but for COPIED), so what the guest reads is known: it must be the same before, after, and
// at every moment of a repair, and after the repair both checks must find nothing.
import { execFileSync, spawnSync } from "node:child_process";
import * as fs from "node:fs";
import { tmpdir } from "node:os";
import * as path from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { CowcatcherError } from "../../src/errors.js";
import { refcountIn, setRefcountIn } from "../../src/image/qcow2/check/blocks.js";
import { readHeader, type Qcow2Header } from "../../src/image/qcow2/format/header.js";
import { openQcow2 } from "../../src/image/qcow2/image.js";
import { checkMetadata } from "../../src/image/qcow2/check/repair.js";
import { createImage, qemuCheck, qemuIo, snapshot } from "../support/qcow2-damage.js";
import { MemoryFile, crashedContent, randomFrom } from "../support/qcow2-memory.js";

const EPISODES_PER_IMAGE = 7;
const CRASHES_PER_EPISODE = 3;
const COPIED_HIGH = 0x80000000;

const SHAPES: Record<string, () => void> = {
  "clusters of 512 bytes": () => build("cluster_size=512", "1M"),
  "clusters of 4 KiB, refcounts of 1 bit": () => build("cluster_size=4k,refcount_bits=1", "1M", false),
  "clusters of 4 KiB, refcounts of 4 bits": () => build("cluster_size=4k,refcount_bits=4", "1M"),
  "clusters of 1 KiB, refcounts of 64 bits": () => build("cluster_size=1k,refcount_bits=64", "1M"),
  "version 2": () => build("compat=0.10,cluster_size=4k", "1M"),
  "clusters of 64 KiB": () => build("cluster_size=64k", "2M", true, "64k"),
};

let folder: string;
let file: string;

beforeAll(() => {
  folder = fs.mkdtempSync(path.join(tmpdir(), "cowcatcher-repair-model-"));
  file = path.join(folder, "disk.qcow2");
});

afterAll(() => {
  fs.rmSync(folder, { recursive: true, force: true });
});

function build(options: string, size: string, withSnapshots = true, compressed = "16k"): void {
  createImage(file, options, size);
  qemuIo(file, "write -P 1 0 300k", "write -P 2 512k 100k", "write -z 128k 64k");
  // One cluster each: the refcounts of 1 bit have no room for two in one.
  if (withSnapshots) qemuIo(file, `write -c -P 3 768k ${compressed}`);
  if (withSnapshots) snapshot(file, "one");
  qemuIo(file, "write -P 4 64k 100k", "discard 512k 64k");
  if (withSnapshots) snapshot(file, "two");
  qemuIo(file, "write -P 5 200k 50k");
}

function headerOf(bytes: Uint8Array): Qcow2Header {
  const read = (buffer: Uint8Array, offset: number): number => {
    const part = bytes.subarray(offset, offset + buffer.length);
    buffer.set(part);
    return part.length;
  };
  return readHeader(read, "memory.qcow2", { allowNoRefcountTable: true });
}

/** Everything that a guest reads; null where the refcount table is such that an open is refused. */
async function guestBytes(bytes: Uint8Array): Promise<Buffer | null> {
  try {
    return await readGuest(bytes);
  } catch (error) {
    if (error instanceof CowcatcherError && /refcount table/.test(error.problem)) return null;
    throw error;
  }
}

async function readGuest(bytes: Uint8Array): Promise<Buffer> {
  const image = await openQcow2({
    path: "memory.qcow2",
    name: "memory.qcow2",
    fd: -1,
    readOnly: true,
    direct: false,
    probed: false,
    backing: null,
    file: new MemoryFile(bytes),
  });
  const content = Buffer.alloc(image.sizeBytes);
  await image.read(content, 0, content.length, 0);
  await image.close();
  return content;
}

type Random = (limit: number) => number;

/** Changes some of the image's refcounts, refcount table entries and flags. */
function damage(bytes: Buffer, header: Qcow2Header, random: Random): void {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const clusterSize = 2 ** header.clusterBits;
  const refcountBits = 2 ** header.refcountOrder;
  const tableAt = header.refcountTableOffset;
  const entries = (header.refcountTableClusters * clusterSize) / 8;
  const l2At = (index: number): number =>
    Number(view.getBigUint64(header.l1TableOffset + index * 8) & 0xfffffffffffe00n);
  const blockView = (index: number): DataView | null => {
    const at = Number(view.getBigUint64(tableAt + index * 8));
    if (at === 0 || at % clusterSize !== 0 || at + clusterSize > bytes.length) return null;
    return new DataView(bytes.buffer, bytes.byteOffset + at, clusterSize);
  };
  const usedBlocks = Array.from({ length: entries }, (_, index) => index).filter((index) => blockView(index));
  const someBlock = (): number => usedBlocks[random(usedBlocks.length)] ?? 0;
  const kinds: (() => void)[] = [
    () => {
      const block = blockView(someBlock());
      const count = (clusterSize * 8) / refcountBits;
      for (let turn = 0; block !== null && turn < 20; turn++) {
        const index = random(Math.min(count, Math.ceil(bytes.length / clusterSize)));
        const max = Math.min(2 ** refcountBits, 6);
        if (refcountIn(block, index, refcountBits) >= 0)
          setRefcountIn(block, index, refcountBits, random(max));
      }
    },
    () => {
      const block = blockView(someBlock());
      for (let at = 0; block !== null && at < clusterSize; at++) block.setUint8(at, 0);
    },
    () => view.setBigUint64(tableAt + someBlock() * 8, 0n),
    () => view.setUint8(tableAt + someBlock() * 8 + 7, 1 + random(255)),
    () => view.setUint8(tableAt + someBlock() * 8 + 6, 2),
    () =>
      view.setBigUint64(
        tableAt + random(entries) * 8,
        BigInt(bytes.length + clusterSize * 40) & ~(BigInt(clusterSize) - 1n),
      ),
    () => view.setBigUint64(tableAt + random(entries) * 8, BigInt(header.l1TableOffset)),
    () => view.setBigUint64(tableAt + random(entries) * 8, view.getBigUint64(tableAt + someBlock() * 8)),
    () => view.setUint32(56, 0),
    () => {
      if (header.version === 3) view.setBigUint64(72, BigInt(random(4)));
    },
    () => {
      for (let index = 0; index < header.l1Size; index++) {
        const at = header.l1TableOffset + index * 8;
        if (l2At(index) !== 0 && random(3) === 0)
          view.setUint32(at, (view.getUint32(at) ^ COPIED_HIGH) >>> 0);
      }
    },
    () => {
      for (let index = 0; index < header.l1Size; index++) {
        for (let at = l2At(index), end = at + clusterSize; l2At(index) !== 0 && at < end; at += 8) {
          const high = view.getUint32(at);
          const isPlain = (high & 0x40000000) === 0 && (view.getBigUint64(at) & 0xfffffffffffe00n) !== 0n;
          if (isPlain && random(8) === 0) view.setUint32(at, (high ^ COPIED_HIGH) >>> 0);
        }
      }
    },
  ];
  for (let count = 1 + random(4); count > 0; count--) kinds[random(kinds.length)]?.();
}

/** How many clusters could be freed and used again while they are needed. */
async function lowRefcounts(bytes: Uint8Array): Promise<number> {
  const { messages } = await checkMetadata(new MemoryFile(bytes), headerOf(bytes));
  return messages.filter((message) => /^ERROR cluster \d+ refcount=/.test(message)).length;
}

/** A crash leaves an image in which no more refcounts are too low; none, where the new structure is in use. */
async function expectNotWorse(crashed: Buffer, damaged: Buffer, label: string): Promise<void> {
  const isSwitched = headerOf(crashed).refcountTableOffset !== headerOf(damaged).refcountTableOffset;
  const most = isSwitched ? 0 : await lowRefcounts(damaged);
  expect(await lowRefcounts(crashed), label).toBeLessThanOrEqual(most);
}

async function repaired(bytes: Uint8Array): Promise<MemoryFile> {
  const memory = new MemoryFile(bytes);
  const { counts } = await checkMetadata(memory, headerOf(bytes), "all");
  expect(counts).toMatchObject({ corruptions: 0, leaks: 0, checkErrors: 0 });
  const after = await checkMetadata(memory, headerOf(memory.content()));
  expect(after.counts).toMatchObject({ corruptions: 0, leaks: 0, checkErrors: 0 });
  expect(after.messages).toEqual([]);
  return memory;
}

describe.each(Object.entries(SHAPES))("repair of random damage: %s", (_name, make) => {
  it("leaves no error, whatever the moment of a crash, and the guest's data as it was", async () => {
    make();
    const original = fs.readFileSync(file);
    const content = (await guestBytes(original)) ?? Buffer.alloc(0);
    for (let episode = 1; episode <= EPISODES_PER_IMAGE; episode++) {
      const random = randomFrom(episode * 977 + original.length);
      const damaged = Buffer.from(original);
      damage(damaged, headerOf(original), random);
      const memory = await repaired(damaged);
      expect((await guestBytes(memory.content()))?.equals(content), `episode ${episode}`).toBe(true);
      if (episode <= 3) {
        fs.writeFileSync(file, memory.content());
        expect(qemuCheck(file), `episode ${episode}`).toMatchObject({ status: 0 });
      }
      for (let crash = 0; crash < CRASHES_PER_EPISODE; crash++) {
        const events = random(memory.log.length + 1);
        const crashed = crashedContent(damaged, memory.log, events, () => random(2) === 0);
        const label = `episode ${episode}, crash after ${events} of ${memory.log.length} events`;
        await expectNotWorse(crashed, damaged, label);
        const meanwhile = await guestBytes(crashed);
        if (meanwhile !== null) expect(meanwhile.equals(content), label).toBe(true);
        const second = await repaired(crashed);
        expect((await guestBytes(second.content()))?.equals(content), label).toBe(true);
      }
    }
  });
});

describe("a repair that is killed", () => {
  it("leaves an image that qemu-img mends", async () => {
    // Many blocks, all wrong: a repair that writes for some milliseconds.
    createImage(file, "cluster_size=512", "4M");
    qemuIo(file, "write -P 1 0 3M");
    const header = headerOf(fs.readFileSync(file));
    const bytes = fs.readFileSync(file);
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
    for (let index = 0; index < 18; index++) {
      const at = Number(view.getBigUint64(header.refcountTableOffset + index * 8));
      bytes.fill(index % 2, at, at + 512);
    }
    view.setBigUint64(header.refcountTableOffset + 20 * 8, 0n);
    fs.writeFileSync(file, bytes);
    const raw = path.join(folder, "before.raw");
    execFileSync("qemu-img", ["convert", "-f", "qcow2", "-O", "raw", file, raw]);
    for (let round = 0; round < 3; round++) {
      const copy = path.join(folder, "killed.qcow2");
      fs.copyFileSync(file, copy);
      const memory = new MemoryFile(fs.readFileSync(copy));
      await checkMetadata(memory, headerOf(memory.content()), "all");
      const writes = memory.log.filter(({ kind }) => kind === "write").length;
      // What a kill leaves is a prefix of the writes: all of them reached the page cache in order.
      const kept = crashedContent(
        bytes,
        memory.log,
        Math.floor((memory.log.length * (round + 1)) / 4),
        () => true,
      );
      expect(writes).toBeGreaterThan(18);
      fs.writeFileSync(copy, kept);
      expect(qemuCheck(copy, "-r", "all").status).toBe(0);
      expect(spawnSync("qemu-img", ["compare", "-F", "raw", copy, raw]).status).toBe(0);
    }
  });
});
