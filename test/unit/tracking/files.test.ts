import { mkdirSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import fc from "fast-check";
import { Bits } from "../../../src/tracking/bits.js";
import { decodeList, encodeList } from "../../../src/tracking/checkpoint-list.js";
import { decodeName } from "../../../src/file-names.js";
import { FileFolder } from "../../../src/tracking/folder.js";
import { crc32c } from "../../../src/tracking/crc32c.js";
import { decodeActive, decodeEpoch, encodeActive, encodeEpoch } from "../../../src/tracking/epoch-file.js";
import {
  copyOffset,
  decodeHead,
  encodeHead,
  type Head,
  HEAD_BYTES,
  NO_IDENTITY,
} from "../../../src/tracking/head.js";

const GENERATION = "01234567-89ab-4cde-8f01-23456789abcd";

it("has RFC 3720's checksums", () => {
  expect(crc32c(new Uint8Array(32))).toBe(0x8a9136aa);
  expect(crc32c(new Uint8Array(32).fill(0xff))).toBe(0x62a8ab43);
  expect(crc32c(Uint8Array.from({ length: 32 }, (_, i) => i))).toBe(0x46dd794e);
  expect(crc32c(Buffer.from("123456789"))).toBe(0xe3069283);
});

describe("bits", () => {
  it("agree with a set of numbers", () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 1, max: 500 }),
        fc.array(fc.tuple(fc.nat(600), fc.nat(40)), { maxLength: 20 }),
        (granules, ranges) => {
          const bits = new Bits(granules * 512 - 1, 512);
          const set = new Set<number>();
          for (const [start, length] of ranges) {
            const first = start % granules;
            const last = Math.min(granules - 1, first + length);
            bits.set(first, last);
            for (let granule = first; granule <= last; granule++) set.add(granule);
            expect(bits.hasAll(first, last)).toBe(true);
          }
          expect(bits.count()).toBe(set.size);
          for (let granule = 0; granule < granules; granule++)
            expect(bits.has(granule)).toBe(set.has(granule));
          for (let at = 0; at < bits.sizeBytes;) {
            const { lengthBytes, dirty } = bits.run(at, bits.sizeBytes - at);
            for (let byte = at; byte < at + lengthBytes; byte += 512) {
              expect(set.has(Math.floor(byte / 512))).toBe(dirty);
            }
            at += lengthBytes;
          }
          const header = {
            generation: GENERATION,
            first: 3,
            last: 3,
            granularityBytes: 512,
            sizeBytes: bits.sizeBytes,
          };
          expect(decodeEpoch(encodeEpoch(header, bits))).toEqual({ header, bits });
          expect(decodeActive(encodeActive(header, bits))).toEqual({ header, bits });
        },
      ),
    );
  });

  it("hasAll is false with any one of the range missing", () => {
    for (let missing = 3; missing <= 40; missing++) {
      const bits = new Bits(64 * 512, 512);
      bits.set(3, 40);
      bits.bytes[missing >>> 3] = (bits.bytes[missing >>> 3] ?? 0) & ~(1 << (missing & 7));
      expect(bits.hasAll(3, 40)).toBe(false);
    }
  });
});

describe("files of a tracking folder", () => {
  const head: Head = {
    sequence: 7,
    generation: GENERATION,
    state: "open",
    mode: "host",
    sizeBytes: 2 ** 40,
    granularityBytes: 65_536,
    extentBytes: 4 * 2 ** 20,
    activeEpoch: 9,
    nextEpoch: 10,
    bootId: GENERATION,
    processId: 4711,
    identity: NO_IDENTITY,
    bitmap: null,
  };

  it("a head is the newer of its valid copies", () => {
    const file = new Uint8Array(HEAD_BYTES);
    const newer = { ...head, sequence: 8, state: "clean", identity: "ab".repeat(32) } as const;
    file.set(encodeHead(head), copyOffset(head));
    expect(decodeHead(file)).toEqual(head);
    file.set(encodeHead(newer), copyOffset(newer));
    expect(decodeHead(file)).toEqual(newer);
    file[copyOffset(newer) + 40] = 0xff;
    expect(decodeHead(file)).toEqual(head);
    file[copyOffset(head) + 40] = 0xff;
    expect(decodeHead(file)).toBeUndefined();
  });

  it("an epoch with any byte changed, or cut short, is none", () => {
    const bits = new Bits(1000 * 512, 512);
    bits.set(10, 300);
    bits.set(700, 700);
    const header = {
      generation: GENERATION,
      first: 1,
      last: 2,
      granularityBytes: 512,
      sizeBytes: bits.sizeBytes,
    };
    const file = encodeEpoch(header, bits);
    for (let at = 0; at < file.length; at++) {
      const rotten = file.slice();
      rotten[at] = (rotten[at] ?? 0) ^ 1;
      expect(decodeEpoch(rotten)).toBeUndefined();
      expect(decodeEpoch(file.subarray(0, at))).toBeUndefined();
    }
  });

  it("a list that a hand has changed is none", () => {
    const checkpoint = { name: "daily", uuid: GENERATION, epoch: 2, createdMs: 1 };
    const list = {
      generation: GENERATION,
      epochs: [{ first: 2, last: 2 }],
      checkpoints: [checkpoint],
      loss: null,
    };
    const text = Buffer.from(encodeList(list)).toString();
    expect(decodeList(Buffer.from(text))).toEqual(list);
    expect(decodeList(Buffer.from(text.replace('"epoch": 2', '"epoch": 3')))).toBeUndefined();
    expect(decodeList(Buffer.from(text.slice(0, -3)))).toBeUndefined();
  });
});

it("a tracking folder may lie in one whose name is not UTF-8", async () => {
  const scratch = mkdtempSync(join(tmpdir(), "cowcatcher-tracking-"));
  try {
    const bytes = Buffer.concat([Buffer.from(`${scratch}/caf`), Buffer.of(0xe9)]);
    mkdirSync(bytes);
    const folder = await FileFolder.open(join(decodeName(bytes), "disk.tracking"), undefined);
    await folder.replace("head", Buffer.from("content"));
    expect(await folder.read("head")).toEqual(Buffer.from("content"));
    expect(await folder.list()).toContain("head");
    expect(await folder.changedMs("head")).toBeGreaterThan(0);
    await folder.remove("head");
    expect(await folder.read("head")).toBeNull();
    await folder.close();
  } finally {
    rmSync(scratch, { recursive: true, force: true });
  }
});
