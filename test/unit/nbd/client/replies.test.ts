// The client's reading side against replies that are right, wrong, and cut at every byte.
import { describe, expect, it } from "vitest";
import { ReplyReader } from "../../../../src/nbd/client/replies.js";
import type { Request } from "../../../../src/nbd/client/request.js";
import {
  NBD_CMD_BLOCK_STATUS,
  NBD_CMD_READ,
  NBD_CMD_WRITE,
  NBD_REPLY_FLAG_DONE,
  NBD_REPLY_TYPE_BLOCK_STATUS,
  NBD_REPLY_TYPE_ERROR,
  NBD_REPLY_TYPE_ERROR_OFFSET,
  NBD_REPLY_TYPE_NONE,
  NBD_REPLY_TYPE_OFFSET_DATA,
  NBD_REPLY_TYPE_OFFSET_HOLE,
  NBD_SIMPLE_REPLY_MAGIC,
  NBD_STRUCTURED_REPLY_MAGIC,
} from "../../../../src/nbd/wire/protocol.js";

const OFFSET = 4096;
const DONE = NBD_REPLY_FLAG_DONE;

interface Outcome {
  request: Request;
  settled: number | undefined;
  broken: string | undefined;
}

/** Feeds `bytes` to a reader that waits for one request, at most `stepBytes` at a time. */
function answer(
  command: number,
  lengthBytes: number,
  bytes: Buffer,
  { structured = true, stepBytes = Infinity } = {},
): Outcome {
  const data = command === NBD_CMD_READ ? new Uint8Array(lengthBytes).fill(0xaa) : undefined;
  const request: Request = {
    ...{ command, flags: 0, offsetBytes: OFFSET, lengthBytes, data, sentMs: 0 },
    resolve: () => undefined,
    reject: () => undefined,
  };
  const outcome: Outcome = { request, settled: undefined, broken: undefined };
  const reader = new ReplyReader({
    structured,
    contexts: new Map([[5, "base:allocation"]]),
    find: (high, low) => (high === 1 && low === 2 && outcome.settled === undefined ? request : undefined),
    settle: (_slot, _request, nbdError) => (outcome.settled = nbdError),
    broken: (problem) => (outcome.broken ??= problem),
  });
  for (let at = 0; at < bytes.length;) {
    const landing = reader.landing();
    const count = bytes.copy(landing, 0, at, Math.min(bytes.length, at + stepBytes));
    expect(count).toBeGreaterThan(0);
    reader.received(count);
    at += count;
  }
  return outcome;
}

function chunk(flags: number, type: number, payload: Buffer = Buffer.alloc(0), cookie = 2): Buffer {
  const header = Buffer.alloc(20);
  header.writeUInt32BE(NBD_STRUCTURED_REPLY_MAGIC, 0);
  header.writeUInt16BE(flags, 4);
  header.writeUInt16BE(type, 6);
  header.writeUInt32BE(1, 8);
  header.writeUInt32BE(cookie, 12);
  header.writeUInt32BE(payload.length, 16);
  return Buffer.concat([header, payload]);
}

function numbers(...parts: [value: number, bytes: 2 | 4 | 8][]): Buffer {
  return Buffer.concat(
    parts.map(([value, bytes]) => {
      const part = Buffer.alloc(bytes);
      if (bytes === 8) part.writeBigUInt64BE(BigInt(value));
      else part.writeUIntBE(value, 0, bytes);
      return part;
    }),
  );
}

const piece = (flags: number, from: number, bytes: Buffer): Buffer =>
  chunk(flags, NBD_REPLY_TYPE_OFFSET_DATA, Buffer.concat([numbers([OFFSET + from, 8]), bytes]));
const hole = (flags: number, from: number, length: number): Buffer =>
  chunk(flags, NBD_REPLY_TYPE_OFFSET_HOLE, numbers([OFFSET + from, 8], [length, 4]));
const simple = (error: number): Buffer => numbers([NBD_SIMPLE_REPLY_MAGIC, 4], [error, 4], [1, 4], [2, 4]);

describe("a structured read", () => {
  const bytes = Buffer.from(Array.from({ length: 9000 }, (_, i) => i % 251));
  const reply = Buffer.concat([
    piece(0, 5000, bytes.subarray(5000)),
    hole(0, 1000, 4000),
    piece(0, 0, bytes.subarray(0, 1000)),
    chunk(DONE, NBD_REPLY_TYPE_NONE),
  ]);
  const expected = Buffer.from(bytes);
  expected.fill(0, 1000, 5000);

  it.each([1, 3, 19, 20, 27, 28, 29, 4095, 4096, Infinity])(
    "is put together from pieces in any order, %s bytes at a time",
    (stepBytes) => {
      const { request, settled, broken } = answer(NBD_CMD_READ, 9000, reply, { stepBytes });
      expect({ settled, broken }).toEqual({ settled: 0, broken: undefined });
      expect(Buffer.from(request.data ?? []).equals(expected)).toBe(true);
    },
  );

  it("ends with the error of any of its chunks, its text fit for a line, its offset if it is inside", () => {
    const text = Buffer.from("bad\u001b sector");
    const error = Buffer.concat([numbers([5, 4], [text.length, 2]), text, numbers([OFFSET + 7, 8])]);
    const { request, settled } = answer(
      NBD_CMD_READ,
      9000,
      Buffer.concat([
        piece(0, 0, bytes.subarray(0, 10)),
        chunk(0, NBD_REPLY_TYPE_ERROR_OFFSET, error),
        chunk(DONE, NBD_REPLY_TYPE_NONE),
      ]),
    );
    expect(settled).toBe(5);
    expect(request).toMatchObject({ nbdErrorText: "bad  sector", nbdErrorOffset: OFFSET + 7 });
    const outside = chunk(DONE, NBD_REPLY_TYPE_ERROR_OFFSET, numbers([28, 4], [0, 2], [1, 8]));
    expect(answer(NBD_CMD_READ, 10, outside)).toMatchObject({
      settled: 28,
      request: { nbdErrorOffset: undefined },
    });
  });

  it.each([
    ["leaves a part out", piece(DONE, 0, bytes.subarray(0, 8999))],
    ["leaves all out", chunk(DONE, NBD_REPLY_TYPE_NONE)],
    ["comes twice", Buffer.concat([piece(0, 0, bytes), piece(DONE, 10, bytes.subarray(0, 5))])],
    ["has a piece over a hole", Buffer.concat([hole(0, 0, 100), piece(0, 99, bytes.subarray(0, 5))])],
    ["reaches over its end", piece(0, 8999, bytes.subarray(0, 2))],
    ["begins before it", piece(0, -1, bytes.subarray(0, 2))],
    ["has a piece without bytes", piece(0, 0, Buffer.alloc(0))],
    [
      "has a piece that is shorter than its offset",
      chunk(0, NBD_REPLY_TYPE_OFFSET_DATA, numbers([OFFSET, 8])),
    ],
    ["has a hole without length", hole(0, 0, 0)],
    ["has a hole chunk of the wrong size", chunk(0, NBD_REPLY_TYPE_OFFSET_HOLE, Buffer.alloc(13))],
    ["has a chunk of an unknown type", chunk(0, 77)],
    ["has a block status", chunk(0, NBD_REPLY_TYPE_BLOCK_STATUS, numbers([5, 4], [1, 4], [0, 4]))],
    ["has an empty chunk with bytes", chunk(DONE, NBD_REPLY_TYPE_NONE, Buffer.alloc(1))],
    ["has an empty chunk that is not the last", chunk(0, NBD_REPLY_TYPE_NONE)],
    ["has an error that is none", chunk(DONE, NBD_REPLY_TYPE_ERROR, numbers([0, 4], [0, 2]))],
    ["has an error that is cut short", chunk(DONE, NBD_REPLY_TYPE_ERROR, Buffer.alloc(5))],
    ["has an error whose text is longer than it", chunk(DONE, NBD_REPLY_TYPE_ERROR, numbers([5, 4], [9, 2]))],
    ["answers something else", chunk(DONE, NBD_REPLY_TYPE_NONE, Buffer.alloc(0), 3)],
    ["comes as a simple reply", simple(0)],
    [
      "promises more than is kept",
      numbers([NBD_STRUCTURED_REPLY_MAGIC, 4], [DONE, 2], [0x8001, 2], [1, 4], [2, 4], [2 ** 32 - 1, 4]),
    ],
    ["is no reply", Buffer.alloc(20, 7)],
  ])("that %s ends the connection", (_name, wrong) => {
    const { settled, broken } = answer(NBD_CMD_READ, 9000, wrong);
    expect(settled).toBeUndefined();
    expect(broken).toEqual(expect.any(String));
  });

  it("in more pieces apart than any server makes ends the connection", () => {
    const pieces = Array.from({ length: 1100 }, (_, i) => piece(0, i * 2, Buffer.alloc(1)));
    expect(answer(NBD_CMD_READ, 9000, Buffer.concat(pieces)).broken).toContain("a piece of a read");
  });
});

describe("other replies", () => {
  it("may be simple or structured for a write, whatever was agreed", () => {
    expect(answer(NBD_CMD_WRITE, 10, simple(28)).settled).toBe(28);
    expect(answer(NBD_CMD_WRITE, 10, chunk(DONE, NBD_REPLY_TYPE_NONE)).settled).toBe(0);
    expect(answer(NBD_CMD_WRITE, 10, piece(DONE, 0, Buffer.alloc(3))).broken).toBeDefined();
  });

  it("are simple where nothing else was agreed", () => {
    const structured = false;
    const { settled, request } = answer(NBD_CMD_READ, 3, Buffer.concat([simple(0), Buffer.from("abc")]), {
      structured,
      stepBytes: 1,
    });
    expect(settled).toBe(0);
    expect(Buffer.from(request.data ?? []).toString()).toBe("abc");
    expect(answer(NBD_CMD_READ, 3, chunk(DONE, NBD_REPLY_TYPE_NONE), { structured }).broken).toBeDefined();
  });

  it("give a block status its extents, once, of a context that was agreed, none of them empty", () => {
    const extents = (context: number, ...pairs: number[]): Buffer =>
      chunk(
        DONE,
        NBD_REPLY_TYPE_BLOCK_STATUS,
        numbers([context, 4], ...pairs.map((n) => [n, 4] as [number, 4])),
      );
    const { settled, request } = answer(NBD_CMD_BLOCK_STATUS, 10_000, extents(5, 4096, 3, 8192, 0));
    expect(settled).toBe(0);
    expect(request.extents?.get("base:allocation")).toEqual({ lengths: [4096, 8192], flags: [3, 0] });
    for (const wrong of [
      extents(6, 1, 0),
      extents(5),
      extents(5, 0, 3),
      extents(5, 1),
      chunk(DONE, NBD_REPLY_TYPE_NONE),
    ]) {
      expect(answer(NBD_CMD_BLOCK_STATUS, 10_000, wrong)).toMatchObject({
        settled: undefined,
        broken: expect.any(String) as string,
      });
    }
  });
});
