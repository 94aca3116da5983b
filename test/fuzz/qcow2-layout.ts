// Where the structures of a sound qcow2 image stand: what the fuzzer aims at. Written apart from the driver's own
// parser, so that a mistake there does not hide the place that would show it. Seeds only: nothing here is careful.

export type FieldKind =
  | "header"
  | "extension"
  | "l1"
  | "l2"
  | "subclusters"
  | "compressed-data"
  | "refcount-table"
  | "refcount"
  | "snapshot"
  | "snapshot-l1"
  | "bitmap"
  | "bitmap-table"
  | "data";

/** One number of the image, or a stretch that is worth hitting. */
export interface Field {
  kind: FieldKind;
  name: string;
  offset: number;
  bytes: 1 | 2 | 4 | 8;
}

export interface Layout {
  clusterBytes: number;
  fileBytes: number;
  version: number;
  fields: Map<FieldKind, Field[]>;
  /** Host offsets of clusters that hold metadata, the header's first. */
  metadata: number[];
  /** Where the header's extensions end: the end marker. */
  extensionsEnd: number;
}

const OFFSET_MASK = 0x00fffffffffffe00n;

const HEADER_FIELDS: readonly (readonly [name: string, offset: number, bytes: 1 | 4 | 8])[] = [
  ["magic", 0, 4],
  ["version", 4, 4],
  ["backing_file_offset", 8, 8],
  ["backing_file_size", 16, 4],
  ["cluster_bits", 20, 4],
  ["size", 24, 8],
  ["crypt_method", 32, 4],
  ["l1_size", 36, 4],
  ["l1_table_offset", 40, 8],
  ["refcount_table_offset", 48, 8],
  ["refcount_table_clusters", 56, 4],
  ["nb_snapshots", 60, 4],
  ["snapshots_offset", 64, 8],
];

const V3_FIELDS: typeof HEADER_FIELDS = [
  ["incompatible_features", 72, 8],
  ["compatible_features", 80, 8],
  ["autoclear_features", 88, 8],
  ["refcount_order", 96, 4],
  ["header_length", 100, 4],
  ["compression_type", 104, 1],
];

export function layoutOf(bytes: Buffer): Layout {
  return new LayoutReader(bytes).read();
}

class LayoutReader {
  private readonly fields = new Map<FieldKind, Field[]>();
  private readonly metadata = new Set<number>([0]);
  private readonly clusterBytes: number;
  private readonly isExtendedL2: boolean;

  constructor(private readonly bytes: Buffer) {
    this.clusterBytes = 2 ** bytes.readUInt32BE(20);
    this.isExtendedL2 = this.version === 3 && (bytes.readBigUInt64BE(72) & 16n) !== 0n;
  }

  private get version(): number {
    return this.bytes.readUInt32BE(4);
  }

  read(): Layout {
    const { bytes, version } = this;
    for (const [name, offset, size] of HEADER_FIELDS) this.add("header", name, offset, size);
    if (version === 3) for (const [name, offset, size] of V3_FIELDS) this.add("header", name, offset, size);
    const extensionsEnd = this.readExtensions(version === 3 ? bytes.readUInt32BE(100) : 72);
    this.readL1("l1", bytes.readUInt32BE(36), this.number(40));
    this.readRefcounts();
    this.readSnapshots();
    const { clusterBytes, fields } = this;
    const metadata = [...this.metadata];
    return { clusterBytes, fileBytes: bytes.length, version, fields, metadata, extensionsEnd };
  }

  private number(offset: number): number {
    return offset + 8 <= this.bytes.length ? Number(this.bytes.readBigUInt64BE(offset)) : 0;
  }

  private pointer(offset: number): number {
    return offset + 8 <= this.bytes.length ? Number(this.bytes.readBigUInt64BE(offset) & OFFSET_MASK) : 0;
  }

  private add(kind: FieldKind, name: string, offset: number, bytes: 1 | 2 | 4 | 8): void {
    const known = this.fields.get(kind);
    if (known === undefined) this.fields.set(kind, [{ kind, name, offset, bytes }]);
    else known.push({ kind, name, offset, bytes });
  }

  private readExtensions(start: number): number {
    let at = start;
    while (this.bytes.readUInt32BE(at) !== 0) {
      const type = this.bytes.readUInt32BE(at);
      const length = this.bytes.readUInt32BE(at + 4);
      this.add("extension", "type", at, 4);
      this.add("extension", "length", at + 4, 4);
      this.add("extension", "data", at + 8, 1);
      if (type === 0x23852875) this.readBitmaps(at + 8);
      at += 8 + Math.ceil(length / 8) * 8;
    }
    this.add("extension", "end", at, 4);
    return at;
  }

  private readL1(kind: "l1" | "snapshot-l1", size: number, table: number): void {
    this.metadata.add(table);
    for (let index = 0; index < size; index++) {
      this.add(kind, `entry ${index}`, table + index * 8, 8);
      const l2 = this.pointer(table + index * 8);
      if (l2 !== 0 && kind === "l1") this.readL2(l2);
    }
  }

  private readL2(table: number): void {
    this.metadata.add(table);
    const entryBytes = this.isExtendedL2 ? 16 : 8;
    // Past the disk's end all entries are alike: some of them are enough.
    const count = Math.min(this.clusterBytes / entryBytes, 64);
    for (let index = 0; index < count; index++) {
      const at = table + index * entryBytes;
      if (at + entryBytes > this.bytes.length) return;
      this.add("l2", `entry ${index}`, at, 8);
      if (this.isExtendedL2) this.add("subclusters", `bitmap ${index}`, at + 8, 8);
      const entry = this.bytes.readBigUInt64BE(at);
      if (entry & (1n << 62n)) {
        const bits = 62n - (BigInt(Math.log2(this.clusterBytes)) - 8n);
        this.add("compressed-data", `of entry ${index}`, Number(entry & ((1n << bits) - 1n)), 1);
      } else if (entry & OFFSET_MASK) {
        this.add("data", `of entry ${index}`, Number(entry & OFFSET_MASK), 8);
      }
    }
  }

  private readRefcounts(): void {
    const table = this.number(48);
    const order = this.version === 3 ? this.bytes.readUInt32BE(96) : 4;
    this.metadata.add(table);
    for (let index = 0; index < 16; index++) {
      this.add("refcount-table", `entry ${index}`, table + index * 8, 8);
      const block = this.pointer(table + index * 8);
      if (block === 0) continue;
      this.metadata.add(block);
      const bytes = Math.max(1, 2 ** order / 8) as 1 | 2 | 4 | 8;
      for (let count = 0; count < 32; count++) this.add("refcount", `${count}`, block + count * bytes, bytes);
    }
  }

  private readSnapshots(): void {
    let at = this.number(64);
    const count = this.bytes.readUInt32BE(60);
    if (count > 0) this.metadata.add(at);
    for (let index = 0; index < count; index++) {
      const fields = [
        ["l1_table_offset", 0, 8],
        ["l1_size", 8, 4],
        ["id_size", 12, 2],
        ["name_size", 14, 2],
        ["date_sec", 16, 4],
        ["vm_clock", 24, 8],
        ["vm_state_size", 32, 4],
        ["extra_size", 36, 4],
        ["extra vm_state_size", 40, 8],
        ["extra disk_size", 48, 8],
      ] as const;
      for (const [name, offset, bytes] of fields)
        this.add("snapshot", `${index} ${name}`, at + offset, bytes);
      this.readL1("snapshot-l1", this.bytes.readUInt32BE(at + 8), this.number(at));
      const [extra, id, name] = [
        this.bytes.readUInt32BE(at + 36),
        this.bytes.readUInt16BE(at + 12),
        this.bytes.readUInt16BE(at + 14),
      ];
      at += Math.ceil((40 + extra + id + name) / 8) * 8;
    }
  }

  private readBitmaps(extension: number): void {
    this.add("bitmap", "nb_bitmaps", extension, 4);
    this.add("bitmap", "directory_size", extension + 8, 8);
    this.add("bitmap", "directory_offset", extension + 16, 8);
    let at = this.number(extension + 16);
    this.metadata.add(at);
    for (let index = 0; index < this.bytes.readUInt32BE(extension); index++) {
      const fields = [
        ["table_offset", 0, 8],
        ["table_size", 8, 4],
        ["flags", 12, 4],
        ["type", 16, 1],
        ["granularity_bits", 17, 1],
        ["name_size", 18, 2],
        ["extra_size", 20, 4],
      ] as const;
      for (const [name, offset, bytes] of fields) this.add("bitmap", `${index} ${name}`, at + offset, bytes);
      this.add("bitmap-table", `of ${index}`, this.number(at), 8);
      this.metadata.add(this.number(at));
      const [name, extra] = [this.bytes.readUInt16BE(at + 18), this.bytes.readUInt32BE(at + 20)];
      at += Math.ceil((24 + extra + name) / 8) * 8;
    }
  }
}
