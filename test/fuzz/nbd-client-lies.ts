// What a server may say that is not so: forged messages, and honest ones that were spoilt on their way.

import * as nbd from "../../src/nbd/wire/protocol.js";
import {
  chunk,
  dataChunk,
  errorChunk,
  holeChunk,
  type MessageKind,
  optionReply,
  type ScriptRequest,
  simpleReply,
  statusChunk,
  uint32,
  uint64,
} from "../support/nbd-script.js";
import type { Random } from "../support/random.js";

const MAX_U64 = 2n ** 64n - 1n;
export const EDGES_32 = [0, 1, 2, 8, 12, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, 65_536, 65_537, 33_554_433];
const EDGES_64 = [0n, 1n, 2n ** 31n, 2n ** 32n - 1n, 2n ** 53n, 2n ** 63n, MAX_U64 - 7n, MAX_U64];
const CHUNK_TYPES = [0, 1, 2, 5, 6, 7, 0x7fff, 0x8000, 0x8001, 0x8002, 0xffff];
/** Million extents are 8 MiB, which is what the client takes at most; one more it does not. */
const MANY_EXTENTS = [1024, 1024 * 1024, 1024 * 1024 + 1];

/** Text that must not reach a terminal as it is. */
function rudeText(random: Random): Buffer {
  const length = random.pick([0, 1, 80, 4096, 65_535]);
  return random.chance(0.5)
    ? Buffer.alloc(length, random.pick([0xff, 0xc3, 0x1b, 0x0a, 0x00]))
    : Buffer.from(Array.from({ length }, () => random.below(256)));
}

/** One or more messages in place of an honest one. */
export function forge(kind: MessageKind, honest: Buffer, random: Random): Buffer[] {
  if (kind.phase === "greeting") return [noise(random)];
  return kind.request === undefined ? forgeOption(honest, random) : forgeReply(kind.request, random);
}

function forgeOption(honest: Buffer, random: Random): Buffer[] {
  const option = honest.length >= 12 ? honest.readUInt32BE(8) : nbd.NBD_OPT_GO;
  const info = (type: number, data: Buffer): Buffer =>
    optionReply(option, nbd.NBD_REP_INFO, Buffer.concat([Buffer.from([type >> 8, type & 255]), data]));
  switch (random.below(9)) {
    case 0: // A flood of what is allowed in small numbers.
      return [
        ...Array<Buffer>(random.pick([10, 62, 63, 64, 65, 3000])).fill(info(1, rudeText(random))),
        honest,
      ];
    case 1: // The answer to an option that was not sent.
      return [optionReply(random.below(12), nbd.NBD_REP_ACK), honest];
    case 2:
      return [optionReply(option, 0x8000_0000 + random.below(14), rudeText(random))];
    case 3:
      return [
        info(nbd.NBD_INFO_EXPORT, Buffer.concat([uint64(random.pick(EDGES_64)), Buffer.from([1, 1])])),
        honest,
      ];
    case 4: {
      const sizes = [0, 1, 2].map(() => uint32(random.pick([...EDGES_32, 512, 4096, 3])));
      return [info(nbd.NBD_INFO_BLOCK_SIZE, Buffer.concat(sizes)), honest];
    }
    case 5:
      return [info(random.pick([0, 1, 2, 3, 77, 65_535]), rudeText(random)), honest];
    case 6: {
      const name = random.pick(["base:allocation", "base:allocatioN", "", "\u001b[2J", "x".repeat(5000)]);
      const context = Buffer.concat([uint32(random.pick(EDGES_32)), Buffer.from(name)]);
      return [optionReply(option, nbd.NBD_REP_META_CONTEXT, context), honest];
    }
    case 7:
      return [optionReply(option, random.pick([0, 1, 2, 3, 4, 5, 99, 0x7fff_ffff]), rudeText(random))];
    default:
      return [optionReply(option, nbd.NBD_REP_ACK, rudeText(random)), honest];
  }
}

/** A part of an answer, true or not, that was made for this request. */
function forgeReply(request: ScriptRequest, random: Random): Buffer[] {
  const { offset, length } = request;
  const isLast = random.chance(0.5);
  const place = (): number =>
    Math.max(0, offset + random.pick([0, 1, length - 1, length, length + 1, length >> 1]));
  const extent = (): [number, number] => [
    random.pick([0, 1, 512, 65_536, 0x7fff_ffff, 0xffff_ffff]),
    random.below(5),
  ];
  const id = random.pick([1, 1, 1, 0, 2, 0xffff_ffff]);
  switch (random.below(14)) {
    case 0:
      return [
        dataChunk(request, place(), Buffer.alloc(random.pick([0, 1, 512, length, length + 1]), 0xdd), isLast),
      ];
    case 1: {
      // The same range twice, or overlapping by a byte.
      const piece = dataChunk(request, offset, Buffer.alloc(Math.max(1, length >> 1), 0xdd), false);
      return [piece, dataChunk(request, place(), Buffer.alloc(1, 0xdd), false), piece];
    }
    case 2: {
      const pieces = Math.min(length >> 1, random.pick([1000, 1024, 1025, 3000]));
      return Array.from({ length: pieces }, (_, i) =>
        dataChunk(request, offset + 2 * i, Buffer.alloc(1, 0xdd), false),
      );
    }
    case 3:
      return [holeChunk(request, place(), random.pick([0, 1, length, length + 1, ...EDGES_32]), isLast)];
    case 4:
      return [chunk(request, 2, uint64(random.pick(EDGES_64)), isLast)];
    case 5: {
      const where = random.chance(0.5) ? undefined : place();
      return [
        errorChunk(request, random.pick([0, 5, 22, 28, 108, 0xffff_ffff]), {
          text: rudeText(random),
          offset: where,
          isLast,
        }),
      ];
    }
    case 6: // Errors without an end.
      return Array<Buffer>(20_000).fill(errorChunk(request, 5, { isLast: false }));
    case 7:
      return [statusChunk(request, id, Array.from({ length: random.below(5) }, extent), isLast)];
    case 8:
      return [
        statusChunk(request, id, Array<[number, number]>(random.pick(MANY_EXTENTS)).fill([1, 0]), isLast),
      ];
    case 9:
      return [simpleReply(request, random.pick([0, 0, 5, 22, 0xffff_ffff]))];
    case 10: {
      const stranger = {
        cookie: random.pick([0n, 1n, request.cookie + 1n, request.cookie ^ (1n << 32n), MAX_U64]),
      };
      return [random.chance(0.5) ? simpleReply(stranger, 0) : chunk(stranger, 0, Buffer.alloc(0), true)];
    }
    case 11:
      return [
        chunk(request, random.pick(CHUNK_TYPES), Buffer.alloc(random.pick([0, 1, 5, 6, 12, 100])), isLast),
      ];
    case 12: // An extended reply: never agreed on.
      return [
        Buffer.concat([
          uint32(nbd.NBD_EXTENDED_REPLY_MAGIC),
          uint32(1 << 16),
          uint64(request.cookie),
          uint64(offset),
          uint64(0),
        ]),
      ];
    default:
      return [noise(random)];
  }
}

/** What ends every connection, whatever it had agreed on, if nothing wrong was said before. */
export function poison(request: ScriptRequest, random: Random): Buffer[] {
  const { command, offset, length } = request;
  const stranger = { cookie: request.cookie ^ (1n << BigInt(32 + random.below(32))) };
  const lies = [
    [simpleReply(stranger, 0)],
    [chunk(stranger, 0, Buffer.alloc(0), true)],
    [
      Buffer.concat([
        uint32(nbd.NBD_EXTENDED_REPLY_MAGIC),
        uint32(1 << 16),
        uint64(request.cookie),
        uint64(0),
      ]),
    ],
    [chunk(request, 77, Buffer.alloc(4), false)],
  ];
  if (command === nbd.NBD_CMD_BLOCK_STATUS) lies.push([statusChunk(request, 1, [[0, 0]], false)]);
  if (command === nbd.NBD_CMD_READ && offset > 0) {
    const half = Buffer.alloc(Math.ceil(length / 2), 0xdd);
    lies.push(
      [dataChunk(request, offset, half, false), dataChunk(request, offset + half.length - 1, half, false)],
      [dataChunk(request, offset + length - 1, Buffer.alloc(2), false)],
      [dataChunk(request, offset - 1, Buffer.alloc(1), false)],
      [holeChunk(request, offset, length + 1, false)],
      [dataChunk(request, offset, half.subarray(1), true)],
    );
  }
  return random.pick(lies);
}

export function noise(random: Random): Buffer {
  return Buffer.from(Array.from({ length: 1 + random.below(200) }, () => random.below(256)));
}

/** Where the fields of a message begin, and how wide they are. */
function fieldsOf(kind: MessageKind, message: Buffer): [at: number, bytes: 2 | 4 | 8][] {
  if (kind.phase === "greeting")
    return [
      [0, 8],
      [8, 8],
      [16, 2],
    ];
  if (kind.phase === "option")
    return [
      [0, 8],
      [8, 4],
      [12, 4],
      [16, 4],
      [20, 2],
      [22, 8],
      [20, 4],
      [24, 4],
      [28, 4],
    ];
  const isSimple = message.length >= 4 && message.readUInt32BE(0) === nbd.NBD_SIMPLE_REPLY_MAGIC;
  if (isSimple)
    return [
      [0, 4],
      [4, 4],
      [8, 4],
      [12, 4],
    ];
  return [
    [0, 4],
    [4, 2],
    [6, 2],
    [8, 4],
    [12, 4],
    [16, 4],
    [20, 8],
    [20, 4],
    [24, 2],
    [24, 4],
    [28, 4],
  ];
}

function setField(kind: MessageKind, message: Buffer, random: Random): Buffer {
  const spoilt = Buffer.from(message);
  const fields = fieldsOf(kind, message).filter(([at, bytes]) => at + bytes <= message.length);
  if (fields.length === 0) return spoilt;
  const [at, bytes] = random.pick(fields);
  if (bytes === 8) spoilt.writeBigUInt64BE(random.pick(EDGES_64), at);
  else if (bytes === 4) spoilt.writeUInt32BE(random.pick(EDGES_32), at);
  else spoilt.writeUInt16BE(random.pick(CHUNK_TYPES), at);
  return spoilt;
}

function flipBit(message: Buffer, random: Random): Buffer {
  const spoilt = Buffer.from(message);
  if (spoilt.length === 0) return spoilt;
  const at = random.below(Math.min(spoilt.length, 48));
  spoilt[at] = (spoilt[at] ?? 0) ^ (1 << random.below(8));
  return spoilt;
}

/** The message as it leaves when it is one of those to be spoilt. */
export function spoil(kind: MessageKind, message: Buffer, random: Random): Buffer[] {
  switch (random.below(10)) {
    case 0:
      return [];
    case 1:
      return [message, message];
    case 2:
      return [message, noise(random)];
    case 3:
      return [flipBit(message, random)];
    case 4:
      return [message.subarray(0, random.below(message.length + 1))];
    case 5:
    case 6:
      return [setField(kind, message, random)];
    case 7:
      return [...forge(kind, message, random), message];
    default:
      return forge(kind, message, random);
  }
}
