// The client's negotiation: fixed newstyle, one GO. Specification: doc/proto.md, "Handshake phase".
//
// TLS, structured replies and metadata contexts are not asked for, so the server may answer with simple replies
// only. Whatever arrives behind the last option reply belongs to the transmission and is handed on as it is.
// Bounds: an option reply's data, the number of replies to one option, and (in client.ts) the time.

import type { Socket } from "node:net";
import { CowcatcherError } from "../errors.js";
import {
  MAX_OPTION_BYTES,
  MAX_PAYLOAD_BYTES,
  NBD_FLAG_C_FIXED_NEWSTYLE,
  NBD_FLAG_C_NO_ZEROES,
  NBD_FLAG_FIXED_NEWSTYLE,
  NBD_FLAG_HAS_FLAGS,
  NBD_FLAG_NO_ZEROES,
  NBD_INFO_BLOCK_SIZE,
  NBD_INFO_EXPORT,
  NBD_INIT_MAGIC,
  NBD_OPTION_MAGIC,
  NBD_OPTION_REPLY_MAGIC,
  NBD_OPT_GO,
  NBD_REP_ACK,
  NBD_REP_ERR_BLOCK_SIZE_REQD,
  NBD_REP_ERR_POLICY,
  NBD_REP_ERR_SHUTDOWN,
  NBD_REP_ERR_TLS_REQD,
  NBD_REP_ERR_UNKNOWN,
  NBD_REP_ERR_UNSUP,
  NBD_REP_INFO,
  OPTION_HEADER_BYTES,
  OPTION_REPLY_HEADER_BYTES,
} from "./protocol.js";

const GREETING_BYTES = 18;
/** A server sends an INFO for each thing that it wants to say of an export; the protocol has a handful. */
const MAX_OPTION_REPLIES = 64;
const FIRST_ERROR_REPLY = 0x80000000;
/** A server's explanation is shown in an error line, so no more of it than a line holds. */
const MAX_SHOWN_CHARACTERS = 200;

/** What the server says of the export. */
export interface ExportInfo {
  sizeBytes: number;
  /** NBD_FLAG_… bits. */
  transmissionFlags: number;
  /** Requests must be aligned to this. */
  minimumBlockBytes: number;
  preferredBlockBytes: number;
  /** Most data in one read or write. */
  maximumPayloadBytes: number;
}

/**
 * Negotiates on a socket that is connected and has no reader yet. On return the socket is paused, and what came
 * behind the negotiation is back in its queue.
 * @throws CowcatcherError PROTOCOL, UNSUPPORTED (no fixed newstyle, no GO, TLS required), NOT_FOUND (no such
 *   export), IO (the connection ended, the server refused).
 */
export async function negotiate(socket: Socket, object: string, exportName: string): Promise<ExportInfo> {
  const reader = new SocketReader(socket, object);
  try {
    const greeting = await reader.read(GREETING_BYTES);
    socket.write(Buffer.concat([clientFlags(greeting, object), goOption(exportName)]));
    return await readGoReplies(reader, object, exportName);
  } finally {
    reader.detach();
  }
}

function clientFlags(greeting: Buffer, object: string): Buffer {
  if (greeting.readBigUInt64BE(0) !== NBD_INIT_MAGIC) {
    throw protocolError(object, "the server does not speak NBD");
  }
  const handshakeFlags = greeting.readUInt16BE(16);
  const isNewstyle = greeting.readBigUInt64BE(8) === NBD_OPTION_MAGIC;
  if (!isNewstyle || (handshakeFlags & NBD_FLAG_FIXED_NEWSTYLE) === 0) {
    throw unsupported(object, "the server has no fixed newstyle negotiation");
  }
  const flags = Buffer.alloc(4);
  const noZeroes = (handshakeFlags & NBD_FLAG_NO_ZEROES) === 0 ? 0 : NBD_FLAG_C_NO_ZEROES;
  flags.writeUInt32BE(NBD_FLAG_C_FIXED_NEWSTYLE | noZeroes);
  return flags;
}

function goOption(exportName: string): Buffer {
  const name = Buffer.from(exportName);
  const option = Buffer.alloc(OPTION_HEADER_BYTES + 4 + name.length + 4);
  option.writeBigUInt64BE(NBD_OPTION_MAGIC, 0);
  option.writeUInt32BE(NBD_OPT_GO, 8);
  option.writeUInt32BE(option.length - OPTION_HEADER_BYTES, 12);
  option.writeUInt32BE(name.length, OPTION_HEADER_BYTES);
  name.copy(option, OPTION_HEADER_BYTES + 4);
  option.writeUInt16BE(1, option.length - 4);
  option.writeUInt16BE(NBD_INFO_BLOCK_SIZE, option.length - 2);
  return option;
}

async function readGoReplies(reader: SocketReader, object: string, exportName: string): Promise<ExportInfo> {
  const info: ExportInfo = {
    sizeBytes: -1,
    transmissionFlags: 0,
    minimumBlockBytes: 1,
    preferredBlockBytes: 4096,
    maximumPayloadBytes: MAX_PAYLOAD_BYTES,
  };
  for (let replyCount = 0; replyCount < MAX_OPTION_REPLIES; replyCount++) {
    const { type, data } = await readOptionReply(reader, object);
    if (type === NBD_REP_INFO) {
      takeInfo(info, data, object);
    } else if (type === NBD_REP_ACK) {
      if (info.sizeBytes < 0) throw protocolError(object, "the server did not say the export's size");
      return info;
    } else {
      throw refusal(type, data, object, exportName);
    }
  }
  throw protocolError(object, `more than ${MAX_OPTION_REPLIES} replies to one option`);
}

async function readOptionReply(
  reader: SocketReader,
  object: string,
): Promise<{ type: number; data: Buffer }> {
  const header = await reader.read(OPTION_REPLY_HEADER_BYTES);
  if (header.readBigUInt64BE(0) !== NBD_OPTION_REPLY_MAGIC || header.readUInt32BE(8) !== NBD_OPT_GO) {
    throw protocolError(object, "the answer to GO is not an option reply");
  }
  const lengthBytes = header.readUInt32BE(16);
  if (lengthBytes > MAX_OPTION_BYTES) {
    throw protocolError(object, `an option reply of ${lengthBytes} bytes (limit ${MAX_OPTION_BYTES})`);
  }
  return { type: header.readUInt32BE(12), data: await reader.read(lengthBytes) };
}

function takeInfo(info: ExportInfo, data: Buffer, object: string): void {
  const type = data.length < 2 ? -1 : data.readUInt16BE(0);
  if (type === NBD_INFO_EXPORT) {
    if (data.length !== 12) throw protocolError(object, `export information of ${data.length} bytes`);
    info.sizeBytes = Number(data.readBigUInt64BE(2));
    info.transmissionFlags = data.readUInt16BE(10);
    if (!Number.isSafeInteger(info.sizeBytes)) {
      throw new CowcatcherError({ code: "LIMIT", object, problem: "the export is larger than 2^53 bytes" });
    }
    if ((info.transmissionFlags & NBD_FLAG_HAS_FLAGS) === 0) info.transmissionFlags = 0;
  } else if (type === NBD_INFO_BLOCK_SIZE) {
    takeBlockSizes(info, data, object);
  }
}

function takeBlockSizes(info: ExportInfo, data: Buffer, object: string): void {
  if (data.length !== 14) throw protocolError(object, `block sizes of ${data.length} bytes`);
  const [minimum, preferred, maximum] = [data.readUInt32BE(2), data.readUInt32BE(6), data.readUInt32BE(10)];
  const isPowerOfTwo = Number.isInteger(Math.log2(minimum));
  if (!isPowerOfTwo || minimum > 65_536 || preferred < minimum || maximum < minimum) {
    throw protocolError(object, `block sizes ${minimum}, ${preferred}, ${maximum}`);
  }
  info.minimumBlockBytes = minimum;
  info.preferredBlockBytes = preferred;
  info.maximumPayloadBytes = Math.min(maximum, MAX_PAYLOAD_BYTES);
}

function refusal(type: number, data: Buffer, object: string, exportName: string): CowcatcherError {
  const said = printable(data);
  const because = said === "" ? "" : `: ${said}`;
  switch (type) {
    case NBD_REP_ERR_UNKNOWN:
      return new CowcatcherError({
        code: "NOT_FOUND",
        object,
        problem: `the server has no export named '${exportName}'${because}`,
      });
    case NBD_REP_ERR_TLS_REQD:
      return unsupported(object, `the server wants TLS, which this version does not have${because}`);
    case NBD_REP_ERR_UNSUP:
      return unsupported(object, `the server does not know the GO option${because}`);
    case NBD_REP_ERR_BLOCK_SIZE_REQD:
      return unsupported(object, `the server does not accept this client's block sizes${because}`);
    case NBD_REP_ERR_POLICY:
      return new CowcatcherError({
        code: "IO",
        object,
        problem: `the server's policy forbids it${because}`,
        errno: "EACCES",
      });
    case NBD_REP_ERR_SHUTDOWN:
      return new CowcatcherError({
        code: "IO",
        object,
        problem: `the server is shutting down${because}`,
        errno: "ESHUTDOWN",
      });
    default:
      return type >= FIRST_ERROR_REPLY
        ? new CowcatcherError({
            code: "IO",
            object,
            problem: `the server refused the export (0x${type.toString(16)})${because}`,
            errno: "EINVAL",
          })
        : protocolError(object, `an option reply of unknown type ${type}`);
  }
}

/** What the server says, fit for one line on a terminal. */
function printable(data: Buffer): string {
  const text = data.subarray(0, 4 * MAX_SHOWN_CHARACTERS).toString("utf8");
  return text.replace(/\p{C}+/gu, " ").slice(0, MAX_SHOWN_CHARACTERS);
}

/** Reads exact counts of bytes from a socket in paused mode, one read at a time. */
class SocketReader {
  #wake: (() => void) | undefined;
  #failure: unknown;
  #isEnded = false;
  readonly #onReadable = (): void => this.#wake?.();
  readonly #onEnd = (): void => {
    this.#isEnded = true;
    this.#wake?.();
  };
  readonly #onError = (error: Error): void => {
    this.#failure = error;
    this.#onEnd();
  };

  constructor(
    private readonly socket: Socket,
    private readonly object: string,
  ) {
    socket.on("readable", this.#onReadable);
    socket.on("end", this.#onEnd);
    socket.on("error", this.#onError);
    socket.on("close", this.#onEnd);
  }

  async read(lengthBytes: number): Promise<Buffer> {
    if (lengthBytes === 0) return Buffer.alloc(0);
    for (;;) {
      const bytes = this.socket.read(lengthBytes) as Buffer | null;
      if (bytes !== null && bytes.length === lengthBytes) return bytes;
      // A stream that ended gives the rest, however short.
      if (bytes !== null || this.#isEnded || this.socket.destroyed) {
        throw new CowcatcherError({
          code: "IO",
          object: this.object,
          problem: "the connection ended during the negotiation",
          errno: "ECONNRESET",
          cause: this.#failure,
        });
      }
      await new Promise<void>((resolve) => {
        this.#wake = resolve;
      });
    }
  }

  detach(): void {
    this.socket.removeListener("readable", this.#onReadable);
    this.socket.removeListener("end", this.#onEnd);
    this.socket.removeListener("error", this.#onError);
    this.socket.removeListener("close", this.#onEnd);
  }
}

export function protocolError(object: string, problem: string): CowcatcherError {
  return new CowcatcherError({ code: "PROTOCOL", object, problem });
}

function unsupported(object: string, problem: string): CowcatcherError {
  return new CowcatcherError({ code: "UNSUPPORTED", object, problem });
}
