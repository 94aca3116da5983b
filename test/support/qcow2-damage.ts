// Images damaged on purpose: made with qemu-img and qemu-io, then changed byte by byte.
import { execFileSync, spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import * as fs from "node:fs";
import { readHeader, type Qcow2Header } from "../../src/image/qcow2/format/header.js";

export const COPIED = 1n << 63n;
const OFFSET_MASK = 0x00fffffffffffe00n;

export function createImage(file: string, options: string, size = "8M"): void {
  execFileSync("qemu-img", ["create", "-q", "-f", "qcow2", "-o", options, file, size]);
}

export function qemuIo(file: string, ...commands: string[]): void {
  const args = commands.flatMap((command) => ["-c", command]);
  execFileSync("qemu-io", ["-f", "qcow2", ...args, file], { stdio: "ignore" });
}

/** The commands, then a SIGKILL: nothing is flushed or closed. */
export function qemuIoKilled(file: string, ...commands: string[]): void {
  const args = [...commands, "sigraise 9"].flatMap((command) => ["-c", command]);
  const { signal } = spawnSync("qemu-io", ["-f", "qcow2", ...args, file], { stdio: "ignore" });
  if (signal !== "SIGKILL") throw new Error(`qemu-io was to be killed, not to end by ${signal}`);
}

export function snapshot(file: string, name: string): void {
  execFileSync("qemu-img", ["snapshot", "-c", name, file]);
}

export interface QemuCheck {
  status: number | null;
  /** Null where the check could not be made. */
  json: Record<string, string | number> | null;
  stderr: string;
}

export function qemuCheck(file: string, ...options: string[]): QemuCheck {
  const args = ["check", "-f", "qcow2", "--output=json", ...options, file];
  const { status, stdout, stderr } = spawnSync("qemu-img", args, { encoding: "utf8" });
  const json = /^\{/m.test(stdout) ? (JSON.parse(stdout) as Record<string, string | number>) : null;
  return { status, json, stderr };
}

/** SHA-256 of what a guest reads, or of a snapshot; null where QEMU cannot read it. */
export function guestDigest(file: string, snapshotName?: string): string | null {
  const raw = `${file}.raw`;
  const of = snapshotName === undefined ? [] : ["-l", `snapshot.name=${snapshotName}`];
  const { status } = spawnSync("qemu-img", ["convert", "-U", "-f", "qcow2", ...of, "-O", "raw", file, raw]);
  try {
    if (status !== 0) return null;
    return createHash("sha256").update(fs.readFileSync(raw)).digest("hex");
  } finally {
    fs.rmSync(raw, { force: true });
  }
}

/** Reads and changes an image's bytes. */
export class Poker {
  readonly header: Qcow2Header;

  constructor(readonly file: string) {
    this.header = this.use("r", (fd) =>
      readHeader((buffer, offset) => fs.readSync(fd, buffer, 0, buffer.length, offset), file),
    );
  }

  private use<T>(flags: string, body: (fd: number) => T): T {
    const fd = fs.openSync(this.file, flags);
    try {
      return body(fd);
    } finally {
      fs.closeSync(fd);
    }
  }

  bytes(offset: number, length: number): Buffer {
    const bytes = Buffer.alloc(length);
    this.use("r", (fd) => fs.readSync(fd, bytes, 0, length, offset));
    return bytes;
  }

  poke(offset: number, bytes: Uint8Array): void {
    this.use("r+", (fd) => fs.writeSync(fd, bytes, 0, bytes.length, offset));
  }

  get(offset: number): bigint {
    return this.bytes(offset, 8).readBigUInt64BE();
  }

  set(offset: number, value: bigint): void {
    const bytes = Buffer.alloc(8);
    bytes.writeBigUInt64BE(value);
    this.poke(offset, bytes);
  }

  set32(offset: number, value: number): void {
    const bytes = Buffer.alloc(4);
    bytes.writeUInt32BE(value);
    this.poke(offset, bytes);
  }

  get l1(): number {
    return this.header.l1TableOffset;
  }

  l2(index = 0): number {
    return Number(this.get(this.l1 + index * 8) & OFFSET_MASK);
  }

  /** Host offset that an L2 entry names. */
  host(index: number): number {
    return Number(this.get(this.l2() + index * 8) & OFFSET_MASK);
  }

  get refcountTable(): number {
    return this.header.refcountTableOffset;
  }

  block(index = 0): number {
    return Number(this.get(this.refcountTable + index * 8));
  }

  setRefcount16(cluster: number, refcount: number): void {
    const bytes = Buffer.alloc(2);
    bytes.writeUInt16BE(refcount);
    this.poke(this.block() + cluster * 2, bytes);
  }

  get end(): number {
    const { size } = fs.statSync(this.file);
    const cluster = 2 ** this.header.clusterBits;
    return Math.ceil(size / cluster) * cluster;
  }

  /** Rewrites the snapshot table in place, each entry with extra data of the length that is asked for. */
  setSnapshotExtra(lengthOf: (index: number) => number): void {
    const at = this.header.snapshotsOffset;
    let from = at;
    const entries: Buffer[] = [];
    for (let index = 0; index < this.header.snapshotCount; index++) {
      const fixed = this.bytes(from, 40);
      const extraBytes = fixed.readUInt32BE(36);
      const textBytes = fixed.readUInt16BE(12) + fixed.readUInt16BE(14);
      const extra = Buffer.alloc(lengthOf(index));
      this.bytes(from + 40, extraBytes).copy(extra);
      const text = this.bytes(from + 40 + extraBytes, textBytes);
      fixed.writeUInt32BE(extra.length, 36);
      const entry = Buffer.concat([fixed, extra, text]);
      entries.push(entry, Buffer.alloc(-entry.length & 7));
      from += Math.ceil((40 + extraBytes + textBytes) / 8) * 8;
    }
    this.poke(at, Buffer.concat(entries));
  }
}
