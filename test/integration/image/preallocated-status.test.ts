// Block status of images whose clusters stand in a row over many L2 tables: what one answer may cost, and all of them.
import * as fs from "node:fs";
import { tmpdir } from "node:os";
import * as path from "node:path";
import { afterAll, beforeAll, expect, it } from "vitest";
import { openImage } from "../../../src/image/open.js";
import { writeMapping, writeRefcounts } from "../../../src/image/qcow2/create/tables.js";
import { planQcow2 } from "../../../src/image/qcow2/create/create.js";
import { serialiseHeader } from "../../../src/image/qcow2/format/header-write.js";
import { EntryDecoder } from "../../../src/image/qcow2/format/entry.js";
import { KiB, MiB, TiB } from "../../../src/units.js";
import { run } from "../../support/cli.js";

const PIECES = 1024;
const PIECE_EVERY_BYTES = 64 * KiB;

let folder: string;

beforeAll(() => {
  folder = fs.mkdtempSync(path.join(tmpdir(), "cowcatcher-preallocated-"));
});

afterAll(() => {
  fs.rmSync(folder, { recursive: true, force: true });
});

/** As a fully preallocated image that was copied with its holes: data in a row, few pages of it stored. */
function makeSparse(sizeBytes: number, clusterSizeBytes: number): string {
  const file = path.join(folder, `${clusterSizeBytes}.qcow2`);
  const { header, layout } = planQcow2(file, { sizeBytes, clusterSizeBytes, preallocation: "full" });
  const fd = fs.openSync(file, "wx");
  const write = (bytes: Uint8Array, offsetBytes: number): void => {
    fs.writeSync(fd, bytes, 0, bytes.length, offsetBytes);
  };
  fs.ftruncateSync(fd, layout.lengthBytes);
  writeRefcounts(layout, clusterSizeBytes, 16, write);
  const { l1Size } = header;
  writeMapping(layout, { clusterSizeBytes, l1Size, sizeBytes, isExtendedL2: false, isWritten: false }, write);
  write(serialiseHeader(header, file), 0);
  const dataFrom = (layout.data?.first ?? 0) * clusterSizeBytes;
  for (let piece = 0; piece < PIECES; piece++) {
    write(Buffer.alloc(4 * KiB, 1), dataFrom + piece * PIECE_EVERY_BYTES);
  }
  fs.closeSync(fd);
  return file;
}

it.each([
  [64 * KiB, 1 * TiB],
  [2 * MiB, 8 * TiB],
])(
  "with clusters of %i looks at each entry a few times, and at few for an answer",
  async (clusterSizeBytes, sizeBytes) => {
    const file = makeSparse(sizeBytes, clusterSizeBytes);
    const image = await openImage(file, { format: "qcow2", readOnly: true });
    let units = 0;
    let mostUnits = 0;
    const scan = Reflect.get<EntryDecoder, "scan">(EntryDecoder.prototype, "scan");
    EntryDecoder.prototype.scan = function (view, index, maxUnits, into): void {
      scan.call(this, view, index, maxUnits, into);
      units += into.unitCount;
    };
    try {
      let dataRuns = 0;
      let answers = 0;
      for (let at = 0; at < sizeBytes; answers++) {
        const before = units;
        const { lengthBytes, zero } = await image.blockStatus(at, sizeBytes - at);
        mostUnits = Math.max(mostUnits, units - before);
        if (!zero) dataRuns++;
        at += lengthBytes;
      }
      expect(dataRuns).toBe(PIECES);
      // The last table may be looked through as well, and a unit of the next.
      expect(mostUnits).toBeLessThan(2 ** 16 + 2);
      expect(units).toBeLessThan(2 * (sizeBytes / clusterSizeBytes) + 64 * answers + 2 ** 17);
    } finally {
      EntryDecoder.prototype.scan = scan;
      await image.close();
    }
    const length = `${PIECES * PIECE_EVERY_BYTES}`;
    const theirs = await run("qemu-img", ["map", "--output=json", "--max-length", length, file]);
    const parsed = JSON.parse(theirs.stdout) as { data: boolean; zero: boolean }[];
    expect(parsed.filter(({ data, zero }) => data && !zero)).toHaveLength(PIECES);
  },
);
