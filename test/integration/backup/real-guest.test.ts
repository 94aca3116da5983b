// A real guest: Linux with ext4 on a disk that `serve` gives it through QEMU's NBD driver. It creates numbered files,
// each followed by fsync and a line on its console, and overwrites old data all the time, while a live backup runs.
//
// The order of events that the test relies on: a number that is seen before the backup is asked for was committed
// before T0; a file that the guest begins after it has answered a question, which was asked when T0 was over, is not.
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { randomFillSync } from "node:crypto";
import { afterEach, describe, expect, it } from "vitest";
import { bootGuest, findGuestKernel } from "../../support/guest-kernel.js";
import {
  contentOf,
  endGuest,
  expectCleanFileSystem,
  FILE_CHARACTERS,
  filesOf,
  lastNumber,
  makeExt4,
  numberOf,
  writingGuest,
} from "../../support/numbered-files.js";
import { leftovers, mustRun, scratchFolder, Server, stopAll } from "../../support/server.js";

afterEach(stopAll);

const DISK_BYTES = 96 * 2 ** 20;
/** What a limit can hold back, and what the guest overwrites. */
const BALLAST_BYTES = 48 * 2 ** 20;
/** Of one overwriting; each of its pages tells on its own when it was written. */
const BALLAST_PIECE_PAGES = 16;
/** For whatever the guest does once it has booted, under TCG too. */
const GUEST_MS = 120_000;

const GUEST_SCRIPT = writingGuest(`printf '%${FILE_CHARACTERS}d' ${"$n ".repeat(BALLAST_PIECE_PAGES)}|
    dd of=/mnt/ballast bs=64k iflag=fullblock seek=$((n * 37 % ${BALLAST_BYTES / 65_536})) conv=notrunc,fsync 2> /dev/null`);

const kernel = findGuestKernel();

describe("a real guest", () => {
  it.for([
    { disk: "disk.raw", target: "backup.qcow2" },
    { disk: "disk.qcow2", target: "backup.raw" },
  ])(
    "writes $disk through a live backup, and $target holds what was committed before T0",
    { timeout: 600_000 },
    async ({ disk, target }, { skip }) => {
      if ("missing" in kernel) {
        process.stderr.write(`real-guest.test.ts: skipped: ${kernel.missing}\n`);
        skip(kernel.missing);
        return;
      }
      const folder = scratchFolder();
      const path = (name: string): string => join(folder, name);
      await makeFileSystem(folder, path(disk));
      const server = await Server.start(folder, [path(disk)], { args: ["-f", formatOf(disk)] });
      const guest = await bootGuest(kernel, {
        script: GUEST_SCRIPT,
        initramfs: path("initramfs"),
        socket: server.socket,
        exportName: "disk",
      });
      await guest.line((line) => line.startsWith("committed 30"), 0, GUEST_MS);

      const committedBefore = lastNumber(guest, "committed");
      const backup = server.backup(path(target), "-O", formatOf(target), "--rate-limit", "512K");
      await backup.started();
      guest.send("mark");
      const atMark = numberOf(await guest.line((line) => line.startsWith("marked"), 0, GUEST_MS));
      // Only then may the backup end.
      await guest.line((line) => line.startsWith("committed") && numberOf(line) > atMark + 20, 0, GUEST_MS);
      expect((await server.jobs("set-speed", await backup.jobId(), "0")).code).toBe(0);
      const { captures } = await backup.succeed();
      const written = await endGuest(guest, GUEST_MS);
      expect((await server.stop()).code).toBe(0);
      expect(leftovers(folder)).toEqual([]);

      expect(captures).toBeGreaterThan(0);
      await expectBackup(folder, path(target), committedBefore, atMark);
      await expectLiveDisk(folder, path(disk), written);
    },
  );
});

async function makeFileSystem(folder: string, disk: string): Promise<void> {
  const content = join(folder, "content");
  mkdirSync(content);
  writeFileSync(join(content, "ballast"), randomFillSync(Buffer.alloc(BALLAST_BYTES)));
  const raw = join(folder, "made.raw");
  await makeExt4(raw, DISK_BYTES, content);
  await mustRun("qemu-img", "convert", "-f", "raw", "-O", formatOf(disk), raw, disk);
}

/** As after a power cut: the journal is replayed, then nothing is wrong and everything committed is there. */
async function expectBackup(folder: string, backup: string, from: number, to: number): Promise<void> {
  const raw = join(folder, "restored.raw");
  await mustRun("qemu-img", "convert", "-f", formatOf(backup), "-O", "raw", backup, raw);
  expect(await mustRun("dumpe2fs", "-h", raw)).toMatch(/needs_recovery/);
  await mustRun("e2fsck", "-y", "-E", "journal_only", raw);
  await expectCleanFileSystem(raw);
  const files = await filesOf(raw, join(folder, "restored"));
  for (let number = 1; number <= from; number++) expect(files.get(number)).toBe(contentOf(number));
  expect(from).toBeGreaterThanOrEqual(30);
  expect(Math.max(...files.keys())).toBeLessThanOrEqual(to);
  expectOldBallast(join(folder, "content/ballast"), join(folder, "restored/ballast"), to);
}

/** Each page is the original, or was overwritten in a round up to `to`: later ones began after T0. */
function expectOldBallast(original: string, restored: string, to: number): void {
  const [before, after] = [readFileSync(original), readFileSync(restored)];
  expect(after.length).toBe(before.length);
  for (let at = 0; at < after.length; at += FILE_CHARACTERS) {
    const page = after.subarray(at, at + FILE_CHARACTERS);
    if (page.equals(before.subarray(at, at + FILE_CHARACTERS))) continue;
    const round = Number(page.toString("latin1"));
    expect(page.toString("latin1"), `page at ${at}`).toBe(contentOf(round));
    expect(round, `round of the page at ${at}`).toBeLessThanOrEqual(to);
  }
}

async function expectLiveDisk(folder: string, disk: string, written: number): Promise<void> {
  const raw = join(folder, "live.raw");
  await mustRun("qemu-img", "convert", "-f", formatOf(disk), "-O", "raw", disk, raw);
  await expectCleanFileSystem(raw);
  const files = await filesOf(raw, join(folder, "live"));
  expect(files.size).toBe(written);
  for (const [number, content] of files) expect(content).toBe(contentOf(number));
}

function formatOf(path: string): string {
  return path.endsWith(".qcow2") ? "qcow2" : "raw";
}
