// Extended headers over a real socket, byte by byte: requests and replies of 32 bytes, payload lengths, 64-bit
// lengths, BLOCK_STATUS with and without a payload. Specification: proto.md, branch extension-ext-header.
import { afterEach, describe, expect, test } from "vitest";
import type { StatusContext } from "../../../../src/nbd/server/export.js";
import * as nbd from "../../../../src/nbd/wire/protocol.js";
import { ExtendedClient } from "../../../support/nbd-extended.js";
import { MemoryDevice, TestServer } from "../../../support/nbd-peer.js";

const SIZE = 1024 * 1024;
const PAYLOAD = nbd.NBD_CMD_FLAG_PAYLOAD_LEN;
const TiB = 2 ** 40;

let server: TestServer | undefined;
afterEach(async () => {
  await server?.stop();
  server = undefined;
});

/** Blocks of 4 KiB, the odd ones dirty. */
const STRIPES: StatusContext = {
  name: "qemu:dirty-bitmap:stripes",
  status(offsetBytes, lengthBytes) {
    const block = Math.floor(offsetBytes / 4096);
    return { lengthBytes: Math.min((block + 1) * 4096 - offsetBytes, lengthBytes), flags: block % 2 };
  },
};

async function start(device: MemoryDevice, contexts: string[] = []): Promise<ExtendedClient> {
  server = await TestServer.start(device, { contexts: [STRIPES] });
  return ExtendedClient.negotiate(server.connect(), contexts);
}

describe("requests and replies", () => {
  test("write, read and flush; each reply repeats cookie and offset", async () => {
    const device = new MemoryDevice(SIZE);
    const client = await start(device);
    const bytes = Buffer.from("abcdefgh");
    await expect(
      client.request(nbd.NBD_CMD_WRITE, { flags: PAYLOAD, offset: 4096, payload: bytes }),
    ).resolves.toBe(0);
    expect(device.data.toString("latin1", 4096, 4104)).toBe("abcdefgh");
    const [chunk] = await client.ask(nbd.NBD_CMD_READ, { offset: 4096, length: 8 });
    expect(chunk?.type).toBe(nbd.NBD_REPLY_TYPE_OFFSET_DATA);
    expect(chunk?.payload.toString("latin1", 8)).toBe("abcdefgh");
    expect(chunk?.payload.readBigUInt64BE(0)).toBe(4096n);
    await expect(client.request(nbd.NBD_CMD_FLUSH)).resolves.toBe(0);
  });

  test("a read with holes is a hole chunk and data chunks of one reply", async () => {
    const device = new MemoryDevice(SIZE);
    device.runs = [
      [128 * 1024, true],
      [128 * 1024, false],
    ];
    const client = await start(device);
    const chunks = await client.ask(nbd.NBD_CMD_READ, { offset: 0, length: 256 * 1024 });
    expect(chunks.map(({ type }) => type)).toEqual([
      nbd.NBD_REPLY_TYPE_OFFSET_HOLE,
      nbd.NBD_REPLY_TYPE_OFFSET_DATA,
    ]);
    const df = await client.ask(nbd.NBD_CMD_READ, {
      flags: nbd.NBD_CMD_FLAG_DF,
      offset: 0,
      length: 256 * 1024,
    });
    expect(df.map(({ type }) => type)).toEqual([nbd.NBD_REPLY_TYPE_OFFSET_DATA]);
  });

  test.each([
    ["WRITE without PAYLOAD_LEN", nbd.NBD_CMD_WRITE, { length: 512 }, nbd.NBD_EINVAL],
    ["READ with a payload", nbd.NBD_CMD_READ, { flags: PAYLOAD, payload: Buffer.alloc(700) }, nbd.NBD_EINVAL],
    ["FLUSH with a payload", nbd.NBD_CMD_FLUSH, { flags: PAYLOAD, payload: Buffer.alloc(9) }, nbd.NBD_EINVAL],
    ["TRIM beyond the end by 2^62", nbd.NBD_CMD_TRIM, { length: 2n ** 62n }, nbd.NBD_EINVAL],
    ["WRITE_ZEROES of 2^64 - 1", nbd.NBD_CMD_WRITE_ZEROES, { length: 2n ** 64n - 1n }, nbd.NBD_ENOSPC],
    ["READ at 2^64 - 1", nbd.NBD_CMD_READ, { offset: 2n ** 64n - 1n, length: 1 }, nbd.NBD_EINVAL],
    ["RESIZE", nbd.NBD_CMD_RESIZE, { length: 4096 }, nbd.NBD_EINVAL],
    ["BLOCK_STATUS without contexts", nbd.NBD_CMD_BLOCK_STATUS, { length: 4096 }, nbd.NBD_EINVAL],
    ["an unknown flag", nbd.NBD_CMD_READ, { flags: 1 << 9, length: 1 }, nbd.NBD_EINVAL],
  ])(
    "%s is refused, its payload read away, and the connection goes on",
    async (_what, command, fields, error) => {
      const client = await start(new MemoryDevice(SIZE));
      await expect(client.request(command, fields)).resolves.toBe(error);
      await expect(client.request(nbd.NBD_CMD_FLUSH)).resolves.toBe(0);
    },
  );

  test("a payload above the advertised maximum ends the connection", async () => {
    const client = await start(new MemoryDevice(SIZE));
    client.send(nbd.NBD_CMD_WRITE, { flags: PAYLOAD, length: nbd.MAX_PAYLOAD_BYTES + 1 });
    await client.raw.readToEnd();
    expect(server?.warnings).toEqual(["client broke the protocol"]);
  });

  test("a compact request ends the connection", async () => {
    const client = await start(new MemoryDevice(SIZE));
    const header = Buffer.alloc(32);
    header.writeUInt32BE(nbd.NBD_REQUEST_MAGIC, 0);
    client.raw.send(header);
    await client.raw.readToEnd();
    expect(server?.warnings).toEqual(["client broke the protocol"]);
  });

  test("TRIM and WRITE_ZEROES above 4 GiB reach the device whole, then FUA flushes", async () => {
    const device = new HugeDevice(16 * TiB);
    const client = await start(device);
    for (const command of [nbd.NBD_CMD_WRITE_ZEROES, nbd.NBD_CMD_TRIM]) {
      device.ranges = [];
      device.flushCount = 0;
      const range = { offset: TiB + 512, length: 5 * 2 ** 30 + 512 };
      await expect(client.request(command, { flags: nbd.NBD_CMD_FLAG_FUA, ...range })).resolves.toBe(0);
      expect(device.ranges).toEqual([[range.offset, range.length]]);
      expect(device.flushCount).toBe(1);
    }
  });
});

/** Takes only notes. */
class HugeDevice extends MemoryDevice {
  ranges: [number, number][] = [];
  flushCount = 0;
  override readonly sizeBytes: number;
  constructor(size: number) {
    super(0);
    this.sizeBytes = size;
  }
  override writeZeroes(offsetBytes: number, lengthBytes: number): undefined {
    this.ranges.push([offsetBytes, lengthBytes]);
  }
  override discard(offsetBytes: number, lengthBytes: number): undefined {
    this.ranges.push([offsetBytes, lengthBytes]);
  }
  override flush(): undefined {
    this.flushCount++;
  }
  override blockStatus(_offsetBytes: number, lengthBytes: number) {
    return { lengthBytes, zero: true, data: false, depth: 0, present: false, compressed: false };
  }
}

describe("block status", () => {
  test("a range above 4 GiB is one 64-bit extent", async () => {
    const client = await start(new HugeDevice(16 * TiB), ["base:allocation"]);
    const [base] = await client.status({ offset: 512, length: 10 * TiB });
    expect(base?.extents).toEqual([[10 * TiB, nbd.NBD_STATE_HOLE | nbd.NBD_STATE_ZERO]]);
  });

  test("one chunk for each context, done on the last; REQ_ONE gives one extent each", async () => {
    const client = await start(new MemoryDevice(SIZE), ["base:allocation", STRIPES.name]);
    const all = await client.status({ offset: 0, length: 16_384 });
    expect(all.map(({ id, extents }) => [id, extents.length])).toEqual([
      [client.ids.get("base:allocation"), 1],
      [client.ids.get(STRIPES.name), 4],
    ]);
    const one = await client.status({ flags: nbd.NBD_CMD_FLAG_REQ_ONE, offset: 4097, length: 16_384 });
    expect(one.map(({ extents }) => extents)).toEqual([[[16_384, 0]], [[4095, 1]]]);
  });

  test("a payload chooses among the contexts", async () => {
    const client = await start(new MemoryDevice(SIZE), ["base:allocation", STRIPES.name]);
    const id = client.ids.get(STRIPES.name) ?? NaN;
    const chosen = await client.status({ flags: PAYLOAD, payload: statusPayload(8192, id) });
    expect(chosen.map((chunk) => chunk.id)).toEqual([id]);
  });

  test.each([
    ["no id", () => statusPayload(4096)],
    ["an unknown id", () => statusPayload(4096, 99)],
    ["an id twice", (id: number) => statusPayload(4096, id, id)],
    ["more ids than contexts", (id: number) => statusPayload(4096, id, 7, 8, 9)],
    ["half an id", (id: number) => statusPayload(4096, id).subarray(0, 10)],
    ["an empty range", (id: number) => statusPayload(0, id)],
    ["a range beyond the end", (id: number) => statusPayload(SIZE + 1, id)],
    ["a range of 2^63", (id: number) => statusPayload(2n ** 63n, id)],
  ])("a payload with %s is refused, and the connection goes on", async (_what, payloadOf) => {
    const client = await start(new MemoryDevice(SIZE), ["base:allocation", STRIPES.name]);
    const payload = payloadOf(client.ids.get(STRIPES.name) ?? NaN);
    await expect(client.request(nbd.NBD_CMD_BLOCK_STATUS, { flags: PAYLOAD, payload })).resolves.toBe(
      nbd.NBD_EINVAL,
    );
    await expect(client.request(nbd.NBD_CMD_FLUSH)).resolves.toBe(0);
  });

  test("a fragmented disk is answered in part, after a bounded number of questions", async () => {
    const device = new FragmentedDevice(16 * TiB);
    const client = await start(device, ["base:allocation"]);
    const [base] = await client.status({ offset: 0, length: 16 * TiB });
    expect(base?.extents).toHaveLength(1);
    expect(device.questionCount).toBeLessThan(10_000);
    expect(base?.extents[0]?.[0]).toBe(device.questionCount * 65_536);
  });
});

/** Data in clusters that are never two in a row. */
class FragmentedDevice extends HugeDevice {
  questionCount = 0;
  override blockStatus() {
    this.questionCount++;
    return { lengthBytes: 65_536, zero: false, data: true, depth: 0, present: true, compressed: false };
  }
}

function statusPayload(length: number | bigint, ...ids: number[]): Buffer {
  const bytes = Buffer.alloc(8 + 4 * ids.length);
  bytes.writeBigUInt64BE(BigInt(length), 0);
  ids.forEach((id, i) => bytes.writeUInt32BE(id, 8 + 4 * i));
  return bytes;
}
