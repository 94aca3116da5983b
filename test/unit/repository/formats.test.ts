import { randomBytes } from "node:crypto";
import { describe, expect, it } from "vitest";
import { ChunkDecoder, ChunkEncoder, CHUNK_HEADER_BYTES } from "../../../src/repository/format/chunk.js";
import { decodeConfig, encodeConfig, parseChunkCompression } from "../../../src/repository/format/config.js";
import { decodeIndex, encodeIndex } from "../../../src/repository/format/index.js";
import { type KeySource, parseKey, unwrapMaster, wrapMaster } from "../../../src/repository/format/keys.js";
import { openMetadata, sealMetadata } from "../../../src/repository/format/metadata.js";
import {
  backupTime,
  chunkName,
  parseBackupObject,
  parseChunkName,
} from "../../../src/repository/format/names.js";
import { PatchTable } from "../../../src/repository/format/patch-table.js";
import { Secrets } from "../../../src/repository/format/secrets.js";
import { decodeIdList, encodeIdList } from "../../../src/repository/work/id-list.js";
import { IdSet, SharedIdSet } from "../../../src/repository/work/id-set.js";

const CHUNK_BYTES = 1024 * 1024;
const ID = "ab".repeat(16);
const PLAIN = new Secrets({ repositoryId: ID, master: null });
const SECRET = new Secrets({ repositoryId: ID, master: new Uint8Array(32).fill(7) });
const OTHER = new Secrets({ repositoryId: ID, master: new Uint8Array(32).fill(8) });

function encode(
  secrets: Secrets,
  content: Uint8Array,
  compression = parseChunkCompression("zstd:1", ""),
): Buffer {
  const encoder = new ChunkEncoder(secrets, CHUNK_BYTES, compression, "store");
  const object = Buffer.from(encoder.encode(secrets.chunkId(content), content));
  encoder.close();
  return object;
}

function decode(secrets: Secrets, id: Uint8Array, object: Buffer): Buffer {
  // It is overwritten.
  const copy = Buffer.from(object);
  return Buffer.from(new ChunkDecoder(secrets, CHUNK_BYTES, "store").decode("chunk", id, copy));
}

describe.each([
  ["plain", PLAIN],
  ["encrypted", SECRET],
])("a chunk, %s", (_kind, secrets) => {
  it.each([
    ["incompressible", randomBytes(5000)],
    ["compressible", Buffer.alloc(70_000, "text ")],
    ["one byte", Buffer.from([1])],
    ["a whole one", Buffer.alloc(CHUNK_BYTES, 3)],
  ])("comes back as it was: %s", (_what, content) => {
    for (const method of ["none", "zstd:1", "zstd:19"]) {
      const object = encode(secrets, content, parseChunkCompression(method, ""));
      expect(decode(secrets, secrets.chunkId(content), object).equals(content)).toBe(true);
    }
  });

  it("with any one bit flipped is refused", () => {
    const content = Buffer.concat([randomBytes(40), Buffer.alloc(200, "x")]);
    const id = secrets.chunkId(content);
    const object = encode(secrets, content);
    const last = secrets === PLAIN ? object.length : 400;
    for (let bit = 0; bit < last * 8; bit++) {
      const flipped = Buffer.from(object);
      flipped[bit >> 3] = (flipped[bit >> 3] ?? 0) ^ (1 << (bit & 7));
      let read: Buffer | undefined;
      try {
        read = decode(secrets, id, flipped);
      } catch (error) {
        expect(error).toMatchObject({ code: "FORMAT" });
      }
      // zstd's frame header has bits that say nothing of the content; what is read is right all the same.
      if (read !== undefined) expect(read.equals(content)).toBe(true);
    }
  });

  it("cut anywhere is refused, and so is one with bytes behind it", () => {
    const content = randomBytes(300);
    const id = secrets.chunkId(content);
    const object = encode(secrets, content);
    const lengths = [...Array(Math.min(object.length, 500)).keys(), object.length - 1];
    for (const length of lengths) {
      expect(() => decode(secrets, id, object.subarray(0, length))).toThrow(/damaged/);
    }
    expect(() => decode(secrets, id, Buffer.concat([object, Buffer.alloc(1)]))).toThrow(/damaged/);
  });

  it("does not pass for another", () => {
    const a = randomBytes(100);
    const b = randomBytes(100);
    expect(() => decode(secrets, secrets.chunkId(b), encode(secrets, a))).toThrow(/damaged/);
  });
});

describe("an encrypted chunk", () => {
  it("is never the same twice, and its length tells little of its content", () => {
    const content = Buffer.alloc(9000, "abc");
    expect(encode(SECRET, content).equals(encode(SECRET, content))).toBe(false);
    const lengths = new Set([1, 100, 5000, 60_000].map((bytes) => encode(SECRET, randomBytes(bytes)).length));
    expect(lengths.size).toBe(1);
    expect((encode(SECRET, content).length - CHUNK_HEADER_BYTES - 16) % 65_536).toBe(0);
  });

  it("has another id in another repository, and does not open with its key", () => {
    const content = randomBytes(100);
    expect(SECRET.chunkId(content).equals(OTHER.chunkId(content))).toBe(false);
    expect(() => decode(OTHER, SECRET.chunkId(content), encode(SECRET, content))).toThrow(
      /this repository's key/,
    );
    const elsewhere = new Secrets({ repositoryId: "cd".repeat(16), master: new Uint8Array(32).fill(7) });
    expect(SECRET.chunkId(content).equals(elsewhere.chunkId(content))).toBe(false);
  });

  it("is refused where the repository is not encrypted, and the other way round", () => {
    const content = randomBytes(100);
    expect(() => decode(PLAIN, PLAIN.chunkId(content), encode(SECRET, content))).toThrow(/encryption/);
    expect(() => decode(SECRET, SECRET.chunkId(content), encode(PLAIN, content))).toThrow(/encryption/);
  });
});

describe.each([
  ["plain", PLAIN],
  ["encrypted", SECRET],
])("metadata, %s", (_kind, secrets) => {
  const NAME = "groups/vm1/2026-11-28T08:31:28.123456789Z/manifest";
  const open = (name: string, object: Buffer, max = 100_000): Promise<Buffer> =>
    openMetadata(secrets, "store", name, object, max);

  it("comes back, large and small", async () => {
    for (const content of [Buffer.alloc(0), Buffer.from("{}"), Buffer.alloc(90_000), randomBytes(90_000)]) {
      expect((await open(NAME, await sealMetadata(secrets, NAME, content))).equals(content)).toBe(true);
    }
  });

  it("with any one bit flipped, cut, or under another name is refused", async () => {
    const object = await sealMetadata(secrets, NAME, Buffer.from('{"group":"vm1"}'));
    for (let bit = 0; bit < object.length * 8; bit++) {
      const flipped = Buffer.from(object);
      flipped[bit >> 3] = (flipped[bit >> 3] ?? 0) ^ (1 << (bit & 7));
      await expect(open(NAME, flipped)).rejects.toMatchObject({ code: "FORMAT" });
    }
    for (let length = 0; length < object.length; length++) {
      await expect(open(NAME, object.subarray(0, length))).rejects.toMatchObject({ code: "FORMAT" });
    }
    for (const name of [
      NAME.replace("vm1", "vm2"),
      NAME.replace("28T", "27T"),
      NAME.replace("manifest", "x.index"),
    ]) {
      await expect(open(name, object)).rejects.toMatchObject({ code: "FORMAT" });
    }
  });

  it("of another repository is refused", async () => {
    const { master } = secrets.description;
    const foreign = new Secrets({ repositoryId: "cd".repeat(16), master });
    await expect(open(NAME, await sealMetadata(foreign, NAME, Buffer.from("{}")))).rejects.toMatchObject({
      code: "FORMAT",
    });
  });

  it("that unpacks to more than it may is refused", async () => {
    const bomb = await sealMetadata(secrets, NAME, Buffer.alloc(10_000_000));
    await expect(open(NAME, bomb)).rejects.toMatchObject({ code: "FORMAT" });
  });
});

describe("the index", () => {
  it("comes back, and is refused where its numbers do not fit", () => {
    const ids = randomBytes(3 * 32);
    const content = encodeIndex({
      sizeBytes: 2 * CHUNK_BYTES + 1,
      chunkBytes: CHUNK_BYTES,
      ids,
      patches: PatchTable.EMPTY,
    });
    expect(decodeIndex("store", "x.index", content)).toMatchObject({ sizeBytes: 2 * CHUNK_BYTES + 1 });
    for (const at of [0, 8, 16, 20]) {
      const wrong = Buffer.from(content);
      wrong[at] = (wrong[at] ?? 0) ^ 0x80;
      const isSize = at === 8;
      // 128 bytes more or less are still three chunks.
      if (!isSize) expect(() => decodeIndex("store", "x.index", wrong)).toThrow(/damaged/);
    }
    expect(() => decodeIndex("store", "x.index", content.subarray(0, 100))).toThrow(/damaged/);
  });
});

describe("the configuration", () => {
  const config = {
    id: ID,
    created: "2026-11-28T00:00:00.000Z",
    chunkBytes: CHUNK_BYTES,
    compression: { type: "zstd", level: 3 } as const,
    version: 2 as const,
  };

  it("is read without the key, and known to be the key's with it", () => {
    const read = decodeConfig("store", encodeConfig({ ...config, encryption: "aes-256-gcm" }, SECRET));
    expect(read.config).toEqual({ ...config, encryption: "aes-256-gcm" });
    expect(read.isOf(SECRET)).toBe(true);
    expect(read.isOf(OTHER)).toBe(false);
    expect(read.isOf(PLAIN)).toBe(false);
  });

  it("cannot be made to say that there is no encryption", () => {
    const text = encodeConfig({ ...config, encryption: "aes-256-gcm" }, SECRET).toString();
    expect(() => decodeConfig("store", Buffer.from(text.replace("aes-256-gcm", "none")))).toThrow(/sum/);
    // Somebody who makes the sum anew cannot make the third line anew.
    const forged = decodeConfig("store", encodeConfig({ ...config, encryption: "none" }, PLAIN));
    expect(forged.isOf(SECRET)).toBe(false);
  });
});

describe("keys", () => {
  const cheap = { n: 16, r: 1, p: 1 };
  const passphrase: KeySource = { kind: "passphrase", passphrase: "Äpfel 1" };
  const file: KeySource = { kind: "file", path: "k", content: randomBytes(32) };
  const master = randomBytes(32);

  it.each([
    ["passphrase", passphrase],
    ["file", file],
  ] as const)("unwrap what they wrapped: %s", async (_k, source) => {
    const { name, object } = await wrapMaster(master, source, ID, "me", cheap);
    const key = parseKey("store", name, object);
    expect(Buffer.from((await unwrapMaster(key, source, ID)) ?? []).equals(master)).toBe(true);
    expect(object.includes(master.toString("base64"))).toBe(false);
  });

  it("do not unwrap with another secret, or for another repository", async () => {
    const { name, object } = await wrapMaster(master, passphrase, ID, "me", cheap);
    const key = parseKey("store", name, object);
    expect(await unwrapMaster(key, { kind: "passphrase", passphrase: "Äpfel 2" }, ID)).toBeNull();
    expect(await unwrapMaster(key, passphrase, "cd".repeat(16))).toBeNull();
    expect(await unwrapMaster(key, file, ID)).toBeNull();
  });

  it("do not make this machine spend more than 1 GiB", async () => {
    const { name, object } = await wrapMaster(master, passphrase, ID, "me", cheap);
    const { createHash } = await import("node:crypto");
    const json = (object.toString().split("\n")[0] ?? "").replace('"n":16', '"n":1073741824');
    const sum = createHash("sha256").update(json).digest("hex");
    expect(() => parseKey("store", name, Buffer.from(`${json}\nsha256 ${sum}\n`))).toThrow(/1 GiB/);
  });
});

describe("names", () => {
  it("of chunks are told by id and generation, and nothing else is taken for one", () => {
    const id = randomBytes(32);
    expect(parseChunkName(chunkName(id))).toEqual({ id, generation: 0 });
    expect(parseChunkName(chunkName(id, 7))).toEqual({ id, generation: 7 });
    for (const wrong of [
      "chunks/00/ab",
      `chunks/zz/${id.toString("hex")}`,
      `${chunkName(id)}.0`,
      `${chunkName(id)}.256`,
    ]) {
      expect(parseChunkName(wrong)).toBeUndefined();
    }
  });

  it("of times are UTC to the nanosecond", () => {
    expect(backupTime(1_795_000_000_123_456_789n)).toBe("2026-11-18T11:06:40.123456789Z");
    expect(parseBackupObject("groups/vm1/2026-11-18T11:06:40.123456789Z/a.index")).toEqual({
      group: "vm1",
      time: "2026-11-18T11:06:40.123456789Z",
      object: "a.index",
    });
    expect(parseBackupObject("groups/../2026-11-18T11:06:40.123456789Z/a.index")).toBeUndefined();
  });
});

describe("lists and sets of ids", () => {
  it("a list comes back, and a changed one is refused", () => {
    const chunks = [
      { id: randomBytes(32), generation: 0 },
      { id: randomBytes(32), generation: 3 },
    ];
    const object = encodeIdList(chunks);
    expect(
      decodeIdList("store", "l", object).map(({ id, generation }) => ({ id: Buffer.from(id), generation })),
    ).toEqual(chunks);
    for (let at = 0; at < object.length; at++) {
      const wrong = Buffer.from(object);
      wrong[at] = (wrong[at] ?? 0) ^ 1;
      expect(() => decodeIdList("store", "l", wrong)).toThrow(/damaged/);
    }
  });

  it("a set holds what was added and nothing else, across its growth", () => {
    const ids = Array.from({ length: 5000 }, () => randomBytes(32));
    const set = new IdSet();
    const shared = SharedIdSet.create(5000);
    for (const id of ids) {
      expect(set.add(id)).toBe(true);
      shared.add(id);
    }
    expect(set.add(ids[17] ?? randomBytes(32))).toBe(false);
    expect(set.size).toBe(5000);
    expect(ids.every((id) => set.has(id) && shared.has(id))).toBe(true);
    expect(set.has(randomBytes(32)) || shared.has(randomBytes(32))).toBe(false);
    expect([...set.values()].length).toBe(5000);
  });

  it("a shared set that is full knows no more, and still ends its search", () => {
    const shared = SharedIdSet.create(1);
    const ids = Array.from({ length: 3000 }, () => randomBytes(32));
    for (const id of ids) shared.add(id);
    expect(ids.filter((id) => shared.has(id)).length).toBeLessThan(1024);
    expect(shared.has(randomBytes(32))).toBe(false);
  });
});
