// NBD_CMD_FLAG_FAST_ZERO: granted where zeroes cost less than data, else ENOTSUP at once with nothing changed.
import { execFileSync } from "node:child_process";
import { mkdtempSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import type { Image } from "../../../../src/block/device.js";
import { openImage } from "../../../../src/image/open.js";
import * as nbd from "../../../../src/nbd/wire/protocol.js";
import { MemoryDevice, requestBytes, TestServer } from "../../../support/nbd-peer.js";

const KiB = 1024;
const MiB = 1024 * KiB;
let folder: string;
let image: Image | undefined;

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "cowcatcher-zero-"));
});
afterEach(async () => {
  await image?.close();
  image = undefined;
  rmSync(folder, { recursive: true, force: true });
});

class SelectiveDevice extends MemoryDevice {
  canZeroFast(offsetBytes: number): boolean {
    return offsetBytes === 0;
  }
}

test("what the device says decides; a refusal comes before the device is asked to write", async () => {
  const device = new SelectiveDevice(64 * KiB);
  const server = await TestServer.start(device);
  try {
    const client = await server.client();
    const ask = async (offset: number, flags: number): Promise<number> => {
      client.send(requestBytes(nbd.NBD_CMD_WRITE_ZEROES, { flags, offset, length: 4096 }));
      return (await client.simpleReply()).error;
    };
    expect(await ask(0, nbd.NBD_CMD_FLAG_FAST_ZERO)).toBe(0);
    expect(await ask(4096, nbd.NBD_CMD_FLAG_FAST_ZERO)).toBe(nbd.NBD_ENOTSUP);
    expect(await ask(4096, 0)).toBe(0);
    expect(device.calls).toEqual(["zero 0+4096 unmap", "zero 4096+4096 unmap"]);
  } finally {
    await server.stop();
  }
});

describe("images", () => {
  const open = async (name: string, ...create: string[]): Promise<Image> => {
    const path = join(folder, name);
    execFileSync("qemu-img", ["create", "-q", ...create, path, "8M"], { cwd: folder });
    image = await openImage(path, { readOnly: false });
    return image;
  };
  const ask = (opened: Image, offset: number, length: number, mayUnmap = true): boolean | undefined =>
    opened.canZeroFast?.(offset, length, { mayUnmap });

  test("qcow2 version 3: whole clusters, and the last one of an odd size", async () => {
    const opened = await open("a.qcow2", "-f", "qcow2");
    expect(ask(opened, 0, 8 * MiB)).toBe(true);
    expect(ask(opened, 64 * KiB, 64 * KiB, false)).toBe(true);
    expect(ask(opened, 0, 4 * KiB)).toBe(false);
    expect(ask(opened, 512, 64 * KiB)).toBe(false);
  });

  test("qcow2 version 2 with a backing file: never, as the backing file would show through", async () => {
    writeFileSync(join(folder, "base.raw"), "");
    truncateSync(join(folder, "base.raw"), 8 * MiB);
    const overlay = await open("b.qcow2", "-f", "qcow2", "-o", "compat=0.10", "-b", "base.raw", "-F", "raw");
    expect(ask(overlay, 0, 64 * KiB)).toBe(false);
  });

  test("raw: holes where the file system makes them; the question changes nothing", async () => {
    const path = join(folder, "c.raw");
    writeFileSync(path, Buffer.alloc(MiB + 1000, 7));
    image = await openImage(path, { format: "raw", readOnly: false });
    const canPunch = ask(image, 0, MiB);
    await image.writeZeroes(0, 512 * KiB, { mayUnmap: true });
    const buffer = Buffer.alloc(MiB + 1000);
    await image.read(buffer, 0, buffer.length, 0);
    expect(buffer.subarray(512 * KiB).every((byte) => byte === 7)).toBe(true);
    expect(image.blockStatus(0, 512 * KiB)).toMatchObject({ zero: canPunch });
    expect(ask(image, 0, 4 * KiB, false)).toBe(true);
  });
});
