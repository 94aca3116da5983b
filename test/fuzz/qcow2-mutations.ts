// Mutations of qcow2 images that know the format: a field gets a value that its kind finds hard, a pointer another
// structure's place, a name a file that must not be read. A mutant is a list of byte patches and a new length, so
// that it can be written down, made again, and kept as a regression test.

import type { Random } from "../support/random.js";
import type { Field, FieldKind, Layout } from "./qcow2-layout.js";

export interface Patch {
  offset: number;
  bytes: Buffer;
}

export interface Mutant {
  patches: Patch[];
  /** The file is cut or stretched to this; undefined: as it was. */
  fileBytes: number | undefined;
  /** For people. */
  notes: string[];
}

/** Names as a backing or data file that the sandbox knows something about (sandbox.ts), and worse. */
export interface HostileNames {
  backing: readonly string[];
  dataFile: readonly string[];
}

const EXTENSIONS = [0xe2792aca, 0x6803f857, 0x23852875, 0x0537be77, 0x44415441, 0x12345678];
const FORMATS = [
  "raw",
  "qcow2",
  "",
  "nbd",
  "vmdk",
  "json:{}",
  "qcow2\0raw",
  "luks",
  "host_device",
  "blkdebug",
];
const INTERESTING = [
  0n,
  1n,
  2n,
  3n,
  7n,
  8n,
  9n,
  21n,
  22n,
  31n,
  32n,
  63n,
  64n,
  72n,
  104n,
  112n,
  255n,
  256n,
  511n,
  512n,
  1023n,
  1024n,
  4096n,
  65535n,
  65536n,
  65537n,
  0x7fffffffn,
  0x80000000n,
  0xffffffffn,
  0x100000000n,
  (1n << 48n) - 512n,
  (1n << 53n) - 1n,
  1n << 53n,
  (1n << 56n) - 512n,
  1n << 56n,
  1n << 62n,
  1n << 63n,
  (1n << 64n) - 1n,
  (1n << 64n) - 512n,
];
const MAX_MUTATIONS = 4;
const MAX_FILE_GROWTH_BYTES = 2 ** 34;

export function mutate(seed: Buffer, layout: Layout, names: HostileNames, random: Random): Mutant {
  const maker = new MutantMaker(seed, layout, names, random);
  const count = 1 + random.below(MAX_MUTATIONS);
  for (let index = 0; index < count; index++) maker.once();
  return maker.mutant;
}

/** The mutant's bytes, for small images and for tests. */
export function applyPatches(seed: Buffer, { patches, fileBytes }: Mutant): Buffer {
  const bytes = Buffer.from(seed);
  for (const { offset, bytes: patch } of patches) patch.copy(bytes, offset);
  if (fileBytes === undefined || fileBytes === bytes.length) return bytes;
  return fileBytes < bytes.length
    ? bytes.subarray(0, fileBytes)
    : Buffer.concat([bytes, Buffer.alloc(fileBytes - bytes.length)]);
}

class MutantMaker {
  readonly mutant: Mutant = { patches: [], fileBytes: undefined, notes: [] };

  constructor(
    private readonly seed: Buffer,
    private readonly layout: Layout,
    private readonly names: HostileNames,
    private readonly random: Random,
  ) {}

  once(): void {
    const { random } = this;
    const roll = random.below(100);
    if (roll < 66) this.hitField();
    else if (roll < 74) this.setBacking();
    else if (roll < 79) this.setDataFile();
    else if (roll < 85) this.addExtension();
    else if (roll < 90) this.resizeFile();
    else if (roll < 95) this.copyCluster();
    else this.flipBits();
  }

  private patch(note: string, offset: number, bytes: Buffer): void {
    if (offset < 0 || offset >= this.seed.length) return;
    const fitting = bytes.subarray(0, this.seed.length - offset);
    this.mutant.patches.push({ offset, bytes: fitting });
    this.mutant.notes.push(`${note} @${offset} = ${fitting.subarray(0, 64).toString("hex")}`);
  }

  private setField({ kind, name, offset, bytes }: Field, value: bigint): void {
    const encoded = Buffer.alloc(8);
    encoded.writeBigUInt64BE(BigInt.asUintN(64, value));
    this.patch(`${kind} ${name}`, offset, encoded.subarray(8 - bytes));
  }

  private fieldOf(kind: FieldKind): Field | undefined {
    const fields = this.layout.fields.get(kind);
    return fields === undefined ? undefined : this.random.pick(fields);
  }

  private hitField(): void {
    const field = this.fieldOf(this.random.pick([...this.layout.fields.keys()]));
    if (field === undefined) return;
    this.setField(field, this.valueFor(field));
  }

  private valueFor({ kind, offset, bytes }: Field): bigint {
    const { random, seed } = this;
    const current =
      offset + bytes > seed.length || offset < 0
        ? 0n
        : BigInt(`0x${seed.toString("hex", offset, offset + bytes)}`);
    const roll = random.below(10);
    if (roll < 2) return current ^ (1n << BigInt(random.below(bytes * 8)));
    if (roll < 3) return current + BigInt(random.below(5) - 2);
    if (roll < 4) return random.pick(INTERESTING);
    switch (kind) {
      case "l2":
        return this.l2Entry();
      case "l1":
      case "snapshot-l1":
        return this.offset() | (random.chance(0.7) ? 1n << 63n : 0n);
      case "subclusters":
        return this.subclusters();
      case "refcount-table":
      case "bitmap-table":
        return this.offset() | (random.chance(0.1) ? 1n : 0n);
      case "header":
      case "extension":
      case "compressed-data":
      case "refcount":
      case "snapshot":
      case "bitmap":
      case "data":
        return random.chance(0.5) ? this.offset() : random.pick(INTERESTING);
    }
  }

  /** A place in the file: mostly of a structure, mostly aligned. */
  private offset(): bigint {
    const { random, layout } = this;
    const { clusterBytes, fileBytes, metadata } = layout;
    const roll = random.below(12);
    if (roll < 4) return BigInt(random.pick(metadata));
    if (roll < 8) return BigInt(random.below(Math.ceil(fileBytes / clusterBytes)) * clusterBytes);
    if (roll < 9) return BigInt(Math.ceil(fileBytes / clusterBytes) * clusterBytes);
    if (roll < 10) return BigInt(random.below(fileBytes));
    if (roll < 11) return BigInt(fileBytes) + BigInt(random.below(1000) * clusterBytes);
    return random.pick(INTERESTING);
  }

  private l2Entry(): bigint {
    const { random } = this;
    const roll = random.below(10);
    if (roll < 3) return (1n << 62n) | this.compressedDescriptor();
    if (roll < 4) return random.pick([0n, 1n, 1n << 63n, (1n << 63n) | 1n]);
    const flags = (random.chance(0.6) ? 1n << 63n : 0n) | (random.chance(0.25) ? 1n : 0n);
    return this.offset() | flags;
  }

  private compressedDescriptor(): bigint {
    const bits = BigInt(62 - (Math.log2(this.layout.clusterBytes) - 8));
    const sectors = BigInt(this.random.below(2 ** Math.min(13, 62 - Number(bits))));
    return (this.offset() + BigInt(this.random.below(600))) | (sectors << bits);
  }

  private subclusters(): bigint {
    const half = (): bigint =>
      this.random.pick([
        0n,
        0xffffffffn,
        BigInt(this.random.below(2 ** 32)),
        1n << BigInt(this.random.below(32)),
      ]);
    return (half() << 32n) | half();
  }

  private setBacking(): void {
    const { random, layout, seed } = this;
    const name = Buffer.from(random.pick(this.names.backing), "latin1");
    const at = layout.extensionsEnd + 8;
    const limit = Math.min(layout.clusterBytes, seed.length);
    if (at + name.length > limit) return;
    const length = random.chance(0.1)
      ? random.pick([0, 1, 1023, 1024, limit - at, limit, 2 ** 31])
      : name.length;
    const fields = Buffer.alloc(12);
    fields.writeBigUInt64BE(BigInt(at));
    fields.writeUInt32BE(length, 8);
    this.patch(`backing name "${name.toString("latin1").slice(0, 60)}"`, at, name);
    this.patch("backing fields", 8, fields);
    if (random.chance(0.6)) this.writeExtension(0xe2792aca, Buffer.from(random.pick(FORMATS), "latin1"), at);
  }

  private setDataFile(): void {
    const name = Buffer.from(this.random.pick(this.names.dataFile), "latin1");
    if (!this.writeExtension(0x44415441, name, this.layout.clusterBytes)) return;
    if (this.layout.version < 3) return;
    const features = this.seed.readBigUInt64BE(72) | 4n;
    this.setField({ kind: "header", name: "incompatible_features", offset: 72, bytes: 8 }, features);
    const autoclear = this.random.pick([0n, 2n, 3n]);
    this.setField({ kind: "header", name: "autoclear_features", offset: 88, bytes: 8 }, autoclear);
  }

  private addExtension(): void {
    const { random } = this;
    const type = random.chance(0.8) ? random.pick(EXTENSIONS) : random.below(2 ** 32);
    const data = Buffer.alloc(random.pick([0, 1, 7, 8, 16, 24, 48, 96, 200]));
    for (let index = 0; index < data.length; index += 4) {
      const word = random.pick([0, 1, 0x41414141, 0xffffffff, random.below(2 ** 32)]);
      for (let byte = 0; byte < 4 && index + byte < data.length; byte++)
        data[index + byte] = word >>> (24 - 8 * byte);
    }
    if (type === 0x23852875 && data.length >= 24 && random.chance(0.7)) {
      data.writeUInt32BE(random.pick([0, 1, 3, 65535, 65536]), 0);
      data.writeBigUInt64BE(random.pick([0n, 24n, 32n, 64n, 65536n, 1n << 26n, 1n << 40n]), 8);
      data.writeBigUInt64BE(this.offset(), 16);
    }
    this.writeExtension(type, data, this.layout.clusterBytes);
  }

  /** Puts an extension where the end marker was, and the marker behind it. */
  private writeExtension(type: number, data: Buffer, areaEnd: number): boolean {
    const bytes = Buffer.alloc(8 + Math.ceil(data.length / 8) * 8 + 8);
    const at = this.layout.extensionsEnd;
    // Before a backing name there is no room: the extension runs into it, as a hostile one may.
    if (at + bytes.length > Math.max(areaEnd, at + 8)) return false;
    bytes.writeUInt32BE(type);
    bytes.writeUInt32BE(this.random.chance(0.1) ? this.random.below(2 ** 32) : data.length, 4);
    data.copy(bytes, 8);
    this.patch(`extension 0x${type.toString(16)}`, at, bytes);
    return true;
  }

  private resizeFile(): void {
    const { random, layout } = this;
    const { fileBytes, clusterBytes } = layout;
    const size = random.pick([
      random.below(fileBytes),
      random.below(Math.ceil(fileBytes / clusterBytes)) * clusterBytes,
      random.below(200),
      fileBytes - 1,
      fileBytes + 1 + random.below(3 * clusterBytes),
      Math.min(fileBytes * 2 ** random.below(20), MAX_FILE_GROWTH_BYTES),
    ]);
    this.mutant.fileBytes = size;
    this.mutant.notes.push(`file of ${size} bytes`);
  }

  private copyCluster(): void {
    const { random, layout, seed } = this;
    const { clusterBytes, metadata } = layout;
    const from = random.pick(metadata);
    const to = random.pick(metadata);
    const count = Math.min(clusterBytes, 4096);
    this.patch(`copy of cluster ${from}`, to, Buffer.from(seed.subarray(from, from + count)));
  }

  private flipBits(): void {
    const { random, layout, seed } = this;
    const start = random.pick(layout.metadata);
    for (let count = 1 + random.below(8); count > 0; count--) {
      const at = start + random.below(Math.min(layout.clusterBytes, 512));
      this.patch("bits", at, Buffer.of((seed[at] ?? 0) ^ (1 << random.below(8))));
    }
  }
}
