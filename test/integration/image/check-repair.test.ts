// Repair, against qemu-img check -r: the corruptions that QEMU's own tests exercise (their numbers in the names).
import * as fs from "node:fs";
import { execFileSync } from "node:child_process";
import { tmpdir } from "node:os";
import * as path from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { CowcatcherError } from "../../../src/errors.js";
import {
  checkExitCode,
  checkImage,
  checkResultToJson,
  type CheckResult,
} from "../../../src/image/qcow2/check/check.js";
import type { RepairMode } from "../../../src/image/qcow2/check/state.js";
import {
  COPIED,
  Poker,
  createImage,
  guestDigest,
  qemuCheck,
  qemuIo,
  qemuIoKilled,
  snapshot,
} from "../../support/qcow2-damage.js";

let folder: string;
let file: string;

beforeEach(() => {
  folder = fs.mkdtempSync(path.join(tmpdir(), "cowcatcher-repair-"));
  file = path.join(folder, "disk.qcow2");
});

afterEach(() => {
  fs.rmSync(folder, { recursive: true, force: true });
});

interface Sample {
  /** Make `file` and damage it. */
  make: () => void;
  mode?: RepairMode;
  /** Ours counts otherwise than QEMU's, for a reason that is given beside it. */
  countsDiffer?: boolean;
  /** What both leave: the exit code of a check afterwards; 0 unless said. */
  left?: number;
  /** Ours leaves less than QEMU's. */
  qemuLeft?: number;
  /** The guest reads a table that the repair changes. */
  readsMetadata?: boolean;
}

const V3 = "cluster_size=64k";
const TABLES: Record<string, Sample> = {
  "039: a killed writer with lazy refcounts": {
    make: () => {
      createImage(file, `${V3},lazy_refcounts=on`);
      qemuIoKilled(file, "write -P 5 0 512k", "write -P 6 6M 64k", "flush");
    },
  },
  "039: the same on an image that had data and a snapshot": {
    make: () => {
      createImage(file, "cluster_size=4k,lazy_refcounts=on");
      qemuIo(file, "write -P 1 0 4M");
      snapshot(file, "before");
      qemuIoKilled(file, "write -P 5 0 512k", "write -P 6 6M 64k", "flush");
    },
  },
  "060: an L2 table in the L1 table's place": {
    make: () => {
      createImage(file, V3);
      const image = new Poker(file);
      image.set(image.l1, COPIED | BigInt(image.l1));
    },
    // QEMU will not write an L1 entry where an L2 table is, here the same one.
    qemuLeft: 1,
    readsMetadata: true,
  },
  "060: a data cluster in the refcount block's place": {
    make: () => {
      createImage(file, V3);
      qemuIo(file, "write -P 1 64k 128k");
      const image = new Poker(file);
      image.set(image.l2(), COPIED | BigInt(image.block()));
    },
  },
  "060: a data cluster in the refcount table's place": {
    make: () => {
      createImage(file, V3);
      qemuIo(file, "write -P 1 64k 128k");
      const image = new Poker(file);
      image.set(image.l2(), COPIED | BigInt(image.refcountTable));
    },
    // QEMU leaves both where they are, with a refcount of two; here the table moves.
    countsDiffer: true,
  },
  "060: a data cluster in an inactive L2 table's place": {
    make: () => {
      createImage(file, V3);
      qemuIo(file, "write -P 1 0 512");
      const before = new Poker(file).l2();
      snapshot(file, "foo");
      qemuIo(file, "write -P 2 0 512");
      const image = new Poker(file);
      image.set(image.l2(), COPIED | BigInt(before));
    },
  },
  "060: an L2 table at no cluster boundary": {
    make: () => {
      createImage(file, V3);
      qemuIo(file, "write -P 1 0 64k");
      const image = new Poker(file);
      image.set(image.l1, image.get(image.l1) | 0x2a00n);
    },
    left: 2,
  },
  "060: a data cluster at no cluster boundary": {
    make: () => {
      createImage(file, V3);
      qemuIo(file, "write -P 1 0 64k");
      const image = new Poker(file);
      image.set(image.l2(), image.get(image.l2()) | 0x2a00n);
    },
    left: 2,
  },
  "060: a zero cluster at no cluster boundary": {
    make: () => {
      createImage(file, V3);
      qemuIo(file, "write -P 1 0 64k", "write -P 1 128k 64k", "write -z 0 64k");
      const image = new Poker(file);
      image.set(image.l2(), image.get(image.l2()) | 0x2a00n);
    },
  },
  "060: the same, with subclusters": {
    make: () => {
      createImage(file, "cluster_size=64k,extended_l2=on");
      qemuIo(file, "write -P 1 0 64k", "write -P 1 128k 64k", "write -z 0 64k");
      const image = new Poker(file);
      image.set(image.l2(), image.get(image.l2()) | 0x2a00n);
    },
  },
  "060: the first refcount block at no cluster boundary": {
    make: () => {
      createImage(file, V3);
      qemuIo(file, "write -P 1 0 64k");
      const image = new Poker(file);
      image.set(image.refcountTable, BigInt(image.block()) | 0x2a00n);
    },
    // QEMU marks the image corrupt when it reads the block, and will not write a new one then.
    qemuLeft: 1,
  },
  "060: no refcount block at all": {
    make: () => {
      createImage(file, V3);
      qemuIo(file, "write -P 1 0 64k");
      const image = new Poker(file);
      image.set(image.refcountTable, 0n);
    },
  },
  "060: a refcount block of zeroes": {
    make: () => {
      createImage(file, V3);
      qemuIo(file, "write -P 1 0 64k");
      const image = new Poker(file);
      image.poke(image.block(), new Uint8Array(65536));
    },
  },
  "060: the header's refcount is zero": {
    make: () => {
      createImage(file, V3);
      qemuIo(file, "write -P 1 0 64k");
      new Poker(file).setRefcount16(0, 0);
    },
  },
  "098: leaked clusters": {
    make: () => {
      createImage(file, V3);
      qemuIo(file, "write -P 1 0 1M", "write -P 2 6M 64k");
      const image = new Poker(file);
      for (let index = 4; index < 12; index++) image.set(image.l2() + index * 8, 0n);
    },
  },
  "098: leaked clusters, leaks alone": {
    make: () => {
      createImage(file, V3);
      qemuIo(file, "write -P 1 0 1M", "write -P 2 6M 64k");
      const image = new Poker(file);
      for (let index = 4; index < 12; index++) image.set(image.l2() + index * 8, 0n);
    },
    mode: "leaks",
  },
  "108: no refcount table": {
    make: () => {
      createImage(file, V3);
      qemuIo(file, "write -P 42 0 64k");
      const image = new Poker(file);
      image.set(48, 0n);
      image.set32(56, 0);
    },
  },
  "108: a data cluster behind the last refcount block's reach": {
    make: () => {
      createImage(file, "cluster_size=512", "64M");
      qemuIo(file, `write -P 7 0 ${0x1b200}`);
      const image = new Poker(file);
      const entry = 0x1b200 / 512;
      image.set(image.l2(Math.floor(entry / 64)) + (entry % 64) * 8, COPIED | 0x20000n);
      fs.truncateSync(file, 0x20200);
      image.poke(0x20000, new Uint8Array(512).fill(42));
    },
  },
  "108: a refcount block outside the file, counted": {
    make: () => {
      createImage(file, V3);
      const image = new Poker(file);
      image.set(image.refcountTable + 8, 0x100000n);
      image.setRefcount16(16, 1);
    },
  },
  "108: a refcount block outside the file, not counted": {
    make: () => {
      createImage(file, V3);
      const image = new Poker(file);
      image.set(image.refcountTable + 8, 0x100000n);
    },
  },
  "108: a refcount block whose end overflows 63 bits": {
    make: () => {
      createImage(file, V3);
      const image = new Poker(file);
      image.set(image.refcountTable + 8, 0x7fffffffffff0000n);
    },
  },
  "108: a refcount block whose end overflows 64 bits": {
    make: () => {
      createImage(file, V3);
      const image = new Poker(file);
      image.set(image.refcountTable + 8, 0xffffffffffff0000n);
    },
  },
  "112: a refcount of 64 bits that is far too high": {
    make: () => {
      createImage(file, `${V3},refcount_bits=64`);
      qemuIo(file, "write -P 1 0 64k");
      const image = new Poker(file);
      image.set(image.block() + 8 * 5, 0x800000000000002an);
    },
  },
  "112: refcounts of 1 bit: two references to a data cluster": {
    make: () => {
      createImage(file, `${V3},refcount_bits=1`);
      qemuIo(file, "write -P 1 0 128k");
      const image = new Poker(file);
      image.set(image.l2() + 8, image.get(image.l2()));
    },
    left: 2,
  },
  "112: refcounts of 2 bits, one of them wrong": {
    make: () => {
      createImage(file, `${V3},refcount_bits=2`);
      qemuIo(file, "write -P 1 0 256k");
      snapshot(file, "one");
      const image = new Poker(file);
      image.poke(image.block(), Uint8Array.of(0xaa));
    },
  },
  "121: a table of many blocks with wrong refcounts": {
    make: () => {
      createImage(file, "cluster_size=512", "8M");
      qemuIo(file, "write -P 1 0 4M");
      const image = new Poker(file);
      image.poke(image.block(3), new Uint8Array(512).fill(7));
      image.poke(image.block(5), new Uint8Array(512));
      image.set(image.refcountTable + 8 * 7, 0n);
    },
  },
  "138: a data cluster at 32 PiB": {
    make: () => {
      createImage(file, "cluster_size=512", "512");
      qemuIo(file, "write 0 512");
      const image = new Poker(file);
      image.set(image.l2(), 0x8080000000000000n);
    },
    left: 2,
  },
  "165: bitmaps, one of which lost a cluster": {
    make: () => {
      createImage(file, "cluster_size=4k");
      bitmap("--add", "-g", "512", file, "first");
      qemuIo(file, "write -P 1 0 1M", "write -P 1 7M 64k");
      const image = new Poker(file);
      const { directoryOffset } = image.header.bitmaps ?? { directoryOffset: 0 };
      const table = Number(image.get(directoryOffset));
      image.set(table, 0n);
    },
  },
  "165: an invalid entry of a bitmap's table": {
    make: () => {
      createImage(file, "cluster_size=4k");
      bitmap("--add", "-g", "512", file, "first");
      qemuIo(file, "write -P 1 0 1M");
      const image = new Poker(file);
      const { directoryOffset } = image.header.bitmaps ?? { directoryOffset: 0 };
      const table = Number(image.get(directoryOffset));
      image.set(table, image.get(table) | 0x10n);
    },
    // QEMU refuses the image, whatever is asked; here the bitmaps are dropped, and it opens again.
    qemuLeft: 1,
  },
  "217: COPIED flags set though a snapshot shares the clusters": {
    make: () => {
      createImage(file, V3);
      qemuIo(file, "write -P 1 0 256k");
      snapshot(file, "foo");
      const image = new Poker(file);
      image.set(image.l1, image.get(image.l1) | COPIED);
      for (let index = 0; index < 4; index++) {
        image.set(image.l2() + index * 8, image.get(image.l2() + index * 8) | COPIED);
      }
    },
  },
  "217: the same, leaks alone": {
    make: () => {
      createImage(file, V3);
      qemuIo(file, "write -P 1 0 256k");
      snapshot(file, "foo");
      const image = new Poker(file);
      image.set(image.l1, image.get(image.l1) | COPIED);
      image.set(image.l2(), image.get(image.l2()) | COPIED);
      image.setRefcount16(12, 1);
    },
    mode: "leaks",
  },
  "217: a snapshot that was half made": {
    make: () => {
      createImage(file, V3);
      qemuIo(file, "write -P 1 0 256k");
      snapshot(file, "foo");
      // The table of snapshots forgets it: its tables and references leak, COPIED is missing everywhere.
      new Poker(file).set32(60, 0);
    },
  },
  "217: wrong refcounts, leaks alone": {
    make: () => {
      createImage(file, V3);
      qemuIo(file, "write -P 1 0 256k");
      const image = new Poker(file);
      image.setRefcount16(5, 3);
      image.set(image.l2() + 8, image.get(image.l2()));
    },
    mode: "leaks",
  },
  "217: refcounts too high and too low, leaks alone": {
    make: () => {
      createImage(file, V3);
      qemuIo(file, "write -P 1 0 256k");
      const image = new Poker(file);
      image.setRefcount16(7, 3);
      image.set(image.l2() + 8, image.get(image.l2()));
    },
    mode: "leaks",
    left: 2,
  },
  "217: missing refcounts, leaks alone": {
    make: () => {
      createImage(file, V3);
      qemuIo(file, "write -P 1 0 256k");
      new Poker(file).setRefcount16(5, 0);
    },
    mode: "leaks",
    left: 1,
  },
  "244: an external data file with a wrong refcount and no COPIED flag": {
    make: () => {
      createImage(file, `${V3},data_file=${path.join(folder, "data.raw")}`);
      qemuIo(file, "write -P 1 0 1M");
      const image = new Poker(file);
      image.setRefcount16(4, 2);
      image.set(image.l2() + 16, image.get(image.l2() + 16) & ~COPIED);
    },
  },
  "244: a compressed cluster in an image with a data file": {
    make: () => {
      createImage(file, `${V3},data_file=${path.join(folder, "data.raw")}`);
      qemuIo(file, "write -P 1 0 1M");
      const image = new Poker(file);
      image.set(image.l2() + 16, 0x4000000000050000n);
    },
    left: 2,
  },
  "261: snapshot table entries without extra data": {
    make: () => {
      createImage(file, V3);
      qemuIo(file, "write -P 1 0 64k");
      for (const name of ["one", "two", "three"]) snapshot(file, name);
      new Poker(file).setSnapshotExtra((index) => [0, 8, 24][index] ?? 0);
    },
  },
  "261: too much extra data": {
    make: () => {
      createImage(file, V3);
      qemuIo(file, "write -P 1 0 64k");
      for (const name of ["one", "two"]) snapshot(file, name);
      new Poker(file).setSnapshotExtra((index) => (index === 0 ? 2000 : 24));
    },
  },
  "271: a subcluster both allocated and zero": {
    make: () => {
      createImage(file, `${V3},extended_l2=on`);
      qemuIo(file, "write -P 1 0 64k", "write -P 1 128k 32k");
      const image = new Poker(file);
      image.set(image.l2() + 8, 0x00000001ffffffffn);
    },
    left: 2,
  },
  "271: subclusters in a cluster that is not allocated": {
    make: () => {
      createImage(file, `${V3},extended_l2=on`);
      qemuIo(file, "write -P 1 0 64k", "write -P 1 128k 32k");
      const image = new Poker(file);
      image.set(image.l2() + 16 + 8, 0x0000000000000003n);
    },
    left: 2,
  },
  "compressed clusters (zlib) with refcounts too low and too high": {
    make: () => {
      createImage(file, V3);
      for (const at of ["0", "64k", "128k", "192k"]) qemuIo(file, `write -c -P 5 ${at} 64k`);
      const image = new Poker(file);
      image.setRefcount16(5, 1);
      image.setRefcount16(4, 9);
    },
  },
  "compressed clusters (zstd) in a block of zeroes": {
    make: () => {
      createImage(file, `${V3},compression_type=zstd`);
      for (const at of ["0", "64k", "128k", "192k"]) qemuIo(file, `write -c -P 5 ${at} 64k`);
      const image = new Poker(file);
      image.poke(image.block(), new Uint8Array(65536));
    },
  },
  "COPIED on a compressed cluster": {
    make: () => {
      createImage(file, V3);
      qemuIo(file, "write -c -P 5 0 64k");
      const image = new Poker(file);
      image.set(image.l2(), image.get(image.l2()) | COPIED);
    },
    left: 2,
  },
  "version 2 with COPIED flags and refcounts wrong": {
    make: () => {
      createImage(file, "compat=0.10");
      qemuIo(file, "write -P 1 0 1M");
      const image = new Poker(file);
      image.set(image.l1, image.get(image.l1) & ~COPIED);
      image.set(image.l2() + 24, image.get(image.l2() + 24) & ~COPIED);
      image.setRefcount16(7, 0);
      image.setRefcount16(8, 3);
    },
  },
  "the corrupt and the dirty bit on a sound image": {
    make: () => {
      createImage(file, V3);
      qemuIo(file, "write -P 1 0 1M");
      new Poker(file).set(72, 3n);
    },
  },
  "clusters of 2 MiB with a block of zeroes": {
    make: () => {
      createImage(file, "cluster_size=2M", "16M");
      qemuIo(file, "write -P 1 0 6M");
      const image = new Poker(file);
      image.poke(image.block(), new Uint8Array(2 ** 21));
    },
  },
};

function bitmap(...args: string[]): void {
  execFileSync("qemu-img", ["bitmap", ...args]);
}

const COMPARED = [
  "corruptions",
  "leaks",
  "check-errors",
  "corruptions-fixed",
  "leaks-fixed",
  "total-clusters",
  "allocated-clusters",
  "fragmented-clusters",
  "compressed-clusters",
];

function comparable(json: Record<string, string | number>): Record<string, string | number | undefined> {
  return Object.fromEntries(COMPARED.map((key) => [key, json[key]]));
}

/** Null where the image cannot be checked, which is exit code 1. */
async function check(of: string, repair?: RepairMode): Promise<CheckResult | null> {
  try {
    return await checkImage(of, { format: "qcow2", repair });
  } catch (error) {
    expect(error).toBeInstanceOf(CowcatcherError);
    return null;
  }
}

/** The messages that name a cluster and its counts. */
function counted(lines: readonly string[]): string[] {
  return lines.filter((line) => /^(?:ERROR|Leaked) cluster \d+ refcount/.test(line));
}

function codeOf(result: CheckResult | null): number {
  return result === null ? 1 : checkExitCode(result);
}

describe("repair of what QEMU's tests break", () => {
  it.each(Object.entries(TABLES))("%s", async (_name, sample) => {
    sample.make();
    const { mode = "all", left = 0, qemuLeft = left, countsDiffer = false, readsMetadata = false } = sample;
    const theirs = path.join(folder, "theirs.qcow2");
    fs.copyFileSync(file, theirs);
    const before = guestDigest(file);

    const qemuFirst = qemuCheck(file);
    const first = await check(file);
    expect(codeOf(first)).toBe(qemuFirst.status);
    if (first !== null && first.messages.length < 1000)
      expect(counted(first.messages)).toEqual(counted(qemuFirst.stderr.split("\n")));
    if (first !== null && qemuFirst.json !== null) {
      expect(comparable(checkResultToJson(first))).toEqual(comparable(qemuFirst.json));
    }

    const qemuRepair = qemuCheck(theirs, "-r", mode);
    const repair = await check(file, mode);
    expect(qemuRepair.status).toBe(qemuLeft);
    expect(codeOf(repair)).toBe(left);
    if (repair !== null && qemuRepair.json !== null && !countsDiffer) {
      expect(comparable(checkResultToJson(repair))).toEqual(comparable(qemuRepair.json));
    }

    const after = qemuCheck(file);
    if (left === 0) {
      expect(after).toMatchObject({ status: 0, json: { "check-errors": 0 } });
      expect(new Poker(file).header.incompatibleFeatures & 3n).toBe(0n);
    }
    if (before !== null && !readsMetadata) expect(guestDigest(file)).toBe(before);
  });
});
