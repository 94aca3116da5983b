// A qcow2 target on a block device whose syncs end when and how the test says: when it looks like an image, and when not.
// The device is a file: what makes it one is that it is written in place and does not start zeroed.

import * as fs from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { CowcatcherError } from "../../../src/errors.js";
import { createTarget } from "../../../src/target/create.js";
import type { TargetFile } from "../../../src/target/file/file.js";
import type { Target } from "../../../src/target/target.js";
import { KiB, MiB } from "../../../src/units.js";

/** Of each sync, in order: what the device's first word was then. */
let headersAtSync: string[];
/** What the next syncs do before they are done; further ones do nothing. */
let nextSyncs: (() => Promise<void>)[];
let openDescriptorCount: number;

vi.mock("../../../src/target/file/file.js", () => ({
  openTargetFile: ({ path }: { path: string }): Promise<TargetFile> => {
    const fd = fs.openSync(path, "r+");
    openDescriptorCount++;
    return Promise.resolve({
      ...{
        name: path,
        readPath: path,
        temporaryPaths: [],
        bufferedFd: fd,
        dataFd: fd,
        direct: false,
        startsZeroed: false,
      },
      capacityBytes: fs.fstatSync(fd).size,
      commit: () => Promise.resolve(),
      unlink: () => Promise.resolve(),
      unlinkSync: () => undefined,
      closeDescriptors: () => {
        fs.closeSync(fd);
        openDescriptorCount--;
        return Promise.resolve();
      },
    });
  },
  syncData: async (name: string): Promise<void> => {
    headersAtSync.push(headerOf(name));
    await nextSyncs.shift()?.();
  },
}));

const OLD = "old!";
const NONE = "\0\0\0\0";
const IMAGE = "QFI\xfb";
const done = (): Promise<void> => Promise.resolve();

let folder: string;
let device: string;

beforeEach(() => {
  folder = fs.mkdtempSync(join(tmpdir(), "cowcatcher-device-"));
  device = join(folder, "device");
  fs.writeFileSync(device, Buffer.alloc(8 * MiB, OLD));
  headersAtSync = [];
  nextSyncs = [];
  openDescriptorCount = 0;
});
afterEach(() => fs.rmSync(folder, { recursive: true }));

function headerOf(path: string): string {
  return fs.readFileSync(path).subarray(0, 4).toString("latin1");
}

function open(): Promise<Target> {
  return createTarget({
    ...{ path: device, format: "qcow2", sizeBytes: 4 * MiB, clusterSizeBytes: 64 * KiB },
    ...{ force: true, direct: false },
  });
}

/** A sync that has begun, and goes on until it is let go. */
function heldSync(): { begun: Promise<void>; letGo: () => void; sync: () => Promise<void> } {
  let letGo: () => void = () => {};
  let begin: () => void = () => {};
  const begun = new Promise<void>((resolve) => (begin = resolve));
  const held = new Promise<void>((resolve) => (letGo = resolve));
  const sync = (): Promise<void> => {
    begin();
    return held;
  };
  return { begun, letGo, sync };
}

async function untilClosed(): Promise<void> {
  await vi.waitFor(() => expect(openDescriptorCount).toBe(0), { interval: 5, timeout: 60_000 });
}

describe("an unfinished qcow2 target on a device", () => {
  it("has the old header taken off the medium before anything else is written", async () => {
    const target = await open();
    expect(headersAtSync).toEqual([NONE]);
    await target.abort();
  });

  it("that cannot be synced is refused at the start", async () => {
    nextSyncs = [() => Promise.reject(new CowcatcherError({ code: "IO", object: device, problem: "EIO" }))];
    await expect(open()).rejects.toMatchObject({ code: "IO" });
    expect(openDescriptorCount).toBe(0);
  });

  it("writes its header when all else is on the medium", async () => {
    await (await open()).finish();
    expect(headersAtSync).toEqual([NONE, NONE, IMAGE]);
    expect(headerOf(device)).toBe(IMAGE);
    expect(openDescriptorCount).toBe(0);
  });

  it("is no image after its last sync has failed", async () => {
    const target = await open();
    const failure = new CowcatcherError({ code: "IO", object: device, problem: "EIO" });
    nextSyncs = [done, () => Promise.reject(failure)];
    await expect(target.complete()).rejects.toBe(failure);
    await target.abort();
    expect(headerOf(device)).toBe(NONE);
    expect(headersAtSync).toEqual([NONE, NONE, IMAGE, NONE]);
    expect(openDescriptorCount).toBe(0);
  });

  it("is no image after it was given up in its last sync", async () => {
    const target = await open();
    const last = heldSync();
    nextSyncs = [done, last.sync];
    const completion = target.complete().catch((error: unknown) => error);
    await last.begun;
    const aborted = target.abort();
    last.letGo();
    await aborted;
    expect(await completion).toMatchObject({ code: "CANCELLED" });
    expect(headerOf(device)).toBe(NONE);
    expect(headersAtSync.at(-1)).toBe(NONE);
    expect(openDescriptorCount).toBe(0);
  });

  it("never gets its header after it was given up in the sync before", async () => {
    const target = await open();
    const first = heldSync();
    nextSyncs = [first.sync];
    const completion = target.complete().catch((error: unknown) => error);
    await first.begun;
    const aborted = target.abort();
    first.letGo();
    await aborted;
    expect(await completion).toMatchObject({ code: "CANCELLED" });
    expect(headerOf(device)).toBe(NONE);
    expect(headersAtSync).not.toContain(IMAGE);
  });

  it("given up in a sync that hangs does not hold up the job, and is wiped when the storage answers", async () => {
    const target = await open();
    const last = heldSync();
    nextSyncs = [done, last.sync];
    target.complete().catch(() => undefined);
    await last.begun;
    await target.abort();
    // Still in use: closing its descriptors now could give their numbers to another file.
    expect(openDescriptorCount).toBe(1);
    last.letGo();
    await untilClosed();
    expect(headerOf(device)).toBe(NONE);
    expect(headersAtSync.at(-1)).toBe(NONE);
  });

  it("given up twice is wiped once", async () => {
    const target = await open();
    await target.complete();
    await Promise.all([target.abort(), target.abort()]);
    await target.abort();
    expect(headersAtSync).toEqual([NONE, NONE, IMAGE, NONE]);
  });

  it("stays when the abort comes after it was committed, or while it is", async () => {
    const target = await open();
    await target.complete();
    const committed = target.commit();
    await Promise.all([target.abort(), target.abort()]);
    await committed;
    await target.abort();
    expect(headerOf(device)).toBe(IMAGE);
  });
});
