// Writes that a server had acknowledged and not flushed when it was lost: kept, or told of.
import { afterEach, describe, expect, it } from "vitest";
import { CowcatcherError } from "../../../../src/errors.js";
import { NbdClient } from "../../../../src/nbd/client/client.js";
import { NbdSession } from "../../../../src/nbd/client/session.js";
import { NbdImage } from "../../../../src/nbd/client/device.js";
import { NBD_CMD_FLUSH, NBD_CMD_READ, NBD_CMD_WRITE, NBD_EIO } from "../../../../src/nbd/wire/protocol.js";
import { digestOfAll, digestOfSample } from "../../../../src/nbd/client/unflushed.js";
import { NbdTargetWriter } from "../../../../src/target/nbd.js";
import { TestServer, until } from "../../../support/nbd-peer.js";
import { ScriptedServer, simpleReply, type ScriptOptions } from "../../../support/nbd-script.js";

const KiB = 1024;
const MiB = 1024 * KiB;
const SIZE = 2 * MiB;

const cleanups: (() => unknown)[] = [];
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
});

async function startScript(options: Partial<ScriptOptions> = {}) {
  const data = Buffer.alloc(SIZE, 7);
  const server = await ScriptedServer.start({ data, ...options });
  cleanups.push(() => server.stop());
  const { uri } = server;
  return { server, data, uri };
}

async function imageOf(options: Partial<ScriptOptions> = {}) {
  const { server, data, uri } = await startScript(options);
  const session = new NbdSession({ uri, retries: 3 });
  cleanups.push(() => session.destroy());
  const image = new NbdImage(session, await session.client(), { readOnly: false });
  const write = (offset: number, length: number, byte: number) =>
    image.write(Buffer.alloc(length, byte), 0, length, offset);
  /** The server goes, and what was not flushed with it; another comes in its place. */
  const crash = (): void => {
    data.fill(7);
    server.hangUp();
  };
  return { server, data, image, write, crash };
}

async function failureOf(work: unknown): Promise<CowcatcherError> {
  const error: unknown = await Promise.resolve(work).then(
    () => undefined,
    (reason: unknown) => reason,
  );
  expect(error).toBeInstanceOf(CowcatcherError);
  return error as CowcatcherError;
}

describe("a flush of an export that a guest uses", () => {
  it("succeeds after a connection was lost and nothing else", async () => {
    const { server, data, image, write } = await imageOf();
    await write(100, 10_000, 1);
    await image.writeZeroes(64 * KiB, 64 * KiB, { mayUnmap: true });
    await write(256 * KiB, 64 * KiB, 2);
    await image.discard(256 * KiB, 64 * KiB);
    server.hangUp();
    // The trim may have had any effect.
    data.fill(99, 256 * KiB, 320 * KiB);
    await image.flush();
    expect(server.connectionCount).toBe(2);
    expect(server.count(NBD_CMD_READ)).toBeGreaterThan(0);
  });

  it.each([
    ["a write", 20_000, (image: NbdImage) => image.write(Buffer.alloc(512, 1), 0, 512, 20_000)],
    ["zeroes", 8192, (image: NbdImage) => image.writeZeroes(8192, 512, { mayUnmap: false })],
  ])("fails once when %s was lost", async (_name, offsetBytes, change) => {
    const { image, crash } = await imageOf();
    await change(image);
    crash();
    // What comes before the flush goes on.
    await image.read(Buffer.alloc(512), 0, 512, 0);
    const error = await failureOf(image.flush());
    expect(error).toMatchObject({ code: "VERIFY", errno: "EIO", offsetBytes });
    expect(error.problem).toContain("does not have what it had acknowledged");
    await image.flush();
  });

  it("finds the loss by itself, and tells all flushes that were under way", async () => {
    const { image, write, crash } = await imageOf();
    await write(0, 4096, 1);
    crash();
    const flushes = [image.flush(), image.flush()];
    for (const flush of flushes) expect((await failureOf(flush)).code).toBe("VERIFY");
    await image.flush();
  });

  it("has nothing to do with what was flushed before", async () => {
    const { server, data, image, write } = await imageOf();
    await write(0, 4096, 1);
    await image.flush();
    server.hangUp();
    // Another client's write.
    data.fill(5);
    await image.flush();
    expect(server.count(NBD_CMD_READ)).toBe(0);
  });

  it("does not count what was acknowledged while it was under way", async () => {
    let answerFlush: () => void = () => undefined;
    const { server, image, write, crash } = await imageOf({
      onRequest: ({ command, connection }) => {
        if (command !== NBD_CMD_FLUSH || connection > 0) return "answer";
        return new Promise((resolve) => (answerFlush = () => resolve("answer")));
      },
    });
    await write(0, 4096, 1);
    const flush = image.flush();
    await until(() => server.count(NBD_CMD_FLUSH) === 1);
    await write(8192, 4096, 2);
    answerFlush();
    await flush;
    crash();
    expect(await failureOf(image.flush())).toMatchObject({ code: "VERIFY", offsetBytes: 8192 });
  });

  it("takes the last of several writes to a place, and the one that was repeated", async () => {
    let isLost = false;
    const { server, data, image, write } = await imageOf({
      onRequest: ({ command, offset, length }) => {
        if (isLost || command !== NBD_CMD_WRITE || offset !== 4096) return "answer";
        isLost = true;
        // Carried out, and the answer is lost.
        data.fill(4, offset, offset + length);
        return "hang up";
      },
    });
    await write(0, 4096, 1);
    await write(0, 4096, 2);
    await write(8192, 4096, 3);
    await write(4096, 8192, 4);
    server.hangUp();
    await image.flush();
    expect(server.connectionCount).toBe(3);
  });

  it("fails where it cannot be known what should be there", async () => {
    const { server, image, write } = await imageOf();
    await write(0, 4096, 1);
    await write(512, 512, 2);
    server.hangUp();
    expect((await failureOf(image.flush())).code).toBe("VERIFY");
  });

  it("is made without being asked for, before too much is not flushed", async () => {
    const { server, image } = await imageOf({
      sizeBytes: BigInt(1024 * MiB),
      answer: (request) => [simpleReply(request, 0)],
    });
    await image.writeZeroes(0, 200 * MiB, { mayUnmap: true });
    expect(server.count(NBD_CMD_FLUSH)).toBe(0);
    await image.writeZeroes(200 * MiB, 100 * MiB, { mayUnmap: true });
    await until(() => server.count(NBD_CMD_FLUSH) === 1);
    // More than can be noted at all.
    await image.writeZeroes(0, 1024 * MiB, { mayUnmap: true });
    await until(() => server.count(NBD_CMD_FLUSH) === 2);
  });

  it("that was made so and failed, fails the guest's next", async () => {
    const { server, image } = await imageOf({
      sizeBytes: BigInt(1024 * MiB),
      onRequest: ({ command }) =>
        command === NBD_CMD_FLUSH && server.count(NBD_CMD_FLUSH) === 1 ? NBD_EIO : "answer",
      answer: (request) => [simpleReply(request, 0)],
    });
    await image.writeZeroes(0, 300 * MiB, { mayUnmap: true });
    await until(() => server.count(NBD_CMD_FLUSH) === 1);
    expect((await failureOf(image.flush())).errno).toBe("EIO");
    await image.flush();
  });

  it("also fails a write with FUA of `serve`", async () => {
    const { image, write, crash } = await imageOf();
    const relay = await TestServer.start(image);
    cleanups.push(() => relay.stop());
    const guest = await NbdClient.connect(relay.uri);
    cleanups.push(() => guest.destroy());
    await write(0, 4096, 1);
    crash();
    const fua = () => guest.write(Buffer.alloc(512, 9), 0, 512, 1 * MiB, { fua: true });
    expect(await failureOf(fua())).toMatchObject({ code: "IO", errno: "EIO" });
    await fua();
  });
});

describe("a backup's writer", () => {
  async function writerOf(options: Partial<ScriptOptions> = {}, sizeBytes = SIZE) {
    const { server, data, uri } = await startScript(options);
    const writer = new NbdTargetWriter(
      {
        format: "nbd",
        name: uri,
        uri,
        sizeBytes,
        exportBytes: sizeBytes,
        retries: 3,
        zeroes: null,
        direct: false,
      },
      () => false,
    );
    cleanups.push(() => writer.close());
    const write = (offset: number, byte: number) => writer.write(Buffer.alloc(MiB, byte), 0, MiB, offset);
    return { server, data, writer, write };
  }

  it("goes on after a connection was lost and nothing else", async () => {
    const { server, data, writer, write } = await writerOf();
    await write(0, 1);
    server.hangUp();
    // The caller tries again, as it does for files.
    await until(() => server.sockets.size === 0);
    await write(MiB, 2);
    server.hangUp();
    await writer.finish();
    expect(server.connectionCount).toBe(3);
    expect([data[0], data[MiB]]).toEqual([1, 2]);
  });

  it.each(["its next write", "its flush"])("fails with %s when the server lost something", async (when) => {
    const { server, data, writer, write } = await writerOf();
    await write(0, 1);
    data.fill(7, 700 * KiB, 704 * KiB);
    server.hangUp();
    await until(() => server.sockets.size === 0);
    const error = await failureOf(when === "its flush" ? writer.finish() : write(MiB, 2));
    expect(error).toMatchObject({ code: "VERIFY", offsetBytes: 512 * KiB });
    // For good.
    expect((await failureOf(writer.finish())).code).toBe("VERIFY");
    expect(server.count(NBD_CMD_FLUSH)).toBe(0);
  });

  it("flushes now and then, and fails when that has failed", async () => {
    const { server, writer } = await writerOf(
      {
        sizeBytes: BigInt(1024 * MiB),
        onRequest: ({ command }) =>
          command === NBD_CMD_FLUSH && server.count(NBD_CMD_FLUSH) === 2 ? NBD_EIO : "answer",
        answer: (request) => [simpleReply(request, 0)],
      },
      1024 * MiB,
    );
    const zero = async (count: number) => {
      for (let i = 0; i < count; i++) await writer.writeZeroes(i * MiB, MiB);
    };
    await zero(511);
    expect(server.count(NBD_CMD_FLUSH)).toBe(0);
    await zero(1024);
    await until(() => server.count(NBD_CMD_FLUSH) >= 2);
    expect(await failureOf(writer.finish())).toMatchObject({ errno: "EIO" });
    expect((await failureOf(writer.writeZeroes(0, MiB))).errno).toBe("EIO");
  });
});

describe("the digests", () => {
  it.each([
    ["of all", digestOfAll],
    ["of a sample", digestOfSample],
  ])("%s tell each page that was lost, by whatever stood there", (_name, digest) => {
    const written = Buffer.from(Array.from({ length: 64 * KiB }, (_, i) => (i * 31 + (i >> 8) * 17) % 251));
    const whole = digest(written, 0, written.length);
    for (let page = 0; page < 16; page++) {
      for (const old of [0, 0xff]) {
        const read = Buffer.from(written).fill(old, page * 4096, (page + 1) * 4096);
        expect(digest(read, 0, read.length)).not.toBe(whole);
      }
    }
    const shifted = Buffer.concat([Buffer.alloc(3), written]);
    expect(digest(shifted, 3, shifted.length)).toBe(whole);
    expect(whole).toBeGreaterThanOrEqual(0);
  });
});
