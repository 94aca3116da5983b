// The client's negotiation: fixed newstyle. Specification: doc/proto.md, "Handshake phase".
//
//   greeting ─► [STARTTLS ─► TLS] ─► STRUCTURED_REPLY ─► SET_META_CONTEXT ─► GO ─► transmission
//
// TLS is asked for when the URI says so, and then nothing goes on without it. Structured replies and metadata contexts
// are asked for and done without where the server has none. Whatever arrives behind the last option reply belongs to
// the transmission and is handed on as it is.
// Bounds: an option reply's data, the number of replies to one option, and (in client.ts) the time.

import type { Socket } from "node:net";
import { CowcatcherError } from "../../errors.js";
import { roundDown } from "../../units.js";
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
  NBD_OPT_SET_META_CONTEXT,
  NBD_OPT_STARTTLS,
  NBD_OPT_STRUCTURED_REPLY,
  NBD_REP_ACK,
  NBD_REP_ERR_BLOCK_SIZE_REQD,
  NBD_REP_ERR_POLICY,
  NBD_REP_ERR_SHUTDOWN,
  NBD_REP_ERR_TLS_REQD,
  NBD_REP_ERR_UNKNOWN,
  NBD_REP_ERR_UNSUP,
  NBD_REP_INFO,
  NBD_REP_META_CONTEXT,
  OPTION_HEADER_BYTES,
  OPTION_REPLY_HEADER_BYTES,
} from "../wire/protocol.js";
import { withExportNames } from "./export-list.js";
import { secure } from "./tls.js";
import type { NbdAddress } from "../wire/uri.js";

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

export interface NegotiateOptions {
  /** Ask for structured replies, without which there are no metadata contexts. */
  structured: boolean;
  /** Metadata contexts that are wanted. */
  contexts: readonly string[];
}

export interface Negotiated {
  /** The one to use from now on: with TLS another than was given. */
  socket: Socket;
  info: ExportInfo;
  structured: boolean;
  /** Name of each metadata context that the server has for the export, by its id. */
  contexts: ReadonlyMap<number, string>;
}

/**
 * Negotiates on a socket that is connected and has no reader yet. On return the socket is paused, and what came
 * behind the negotiation is back in its queue.
 * @throws CowcatcherError PROTOCOL, UNSUPPORTED (no fixed newstyle, no GO, TLS required or refused), NOT_FOUND (no
 *   such export), IO (the connection ended, the server refused), and as `secure`.
 */
export async function negotiate(
  socket: Socket,
  object: string,
  address: NbdAddress,
  { structured, contexts }: NegotiateOptions,
): Promise<Negotiated> {
  let talk = new Negotiation(socket, object);
  try {
    const flags = clientFlags(await talk.reader.read(GREETING_BYTES), object);
    socket.write(flags);
    if (address.tls !== undefined) {
      await startTls(talk);
      talk.reader.detach();
      const secured = await secure(socket, object, address, address.tls);
      talk = new Negotiation(secured, object);
    }
    const isStructured = structured && (await acknowledged(talk, NBD_OPT_STRUCTURED_REPLY));
    const known =
      isStructured && contexts.length > 0 ? await setContexts(talk, address.exportName, contexts) : new Map();
    talk.send(NBD_OPT_GO, goData(address.exportName));
    const info = await readGoReplies(talk, address.exportName);
    return { socket: talk.socket, info, structured: isStructured, contexts: known };
  } catch (error) {
    talk.socket.destroy();
    throw error;
  } finally {
    talk.reader.detach();
  }
}

/** One side of the conversation: options out, option replies in. */
class Negotiation {
  readonly reader: SocketReader;

  constructor(
    readonly socket: Socket,
    readonly object: string,
  ) {
    this.reader = new SocketReader(socket, object);
  }

  send(option: number, data: Buffer = Buffer.alloc(0)): void {
    const header = Buffer.alloc(OPTION_HEADER_BYTES);
    header.writeBigUInt64BE(NBD_OPTION_MAGIC, 0);
    header.writeUInt32BE(option, 8);
    header.writeUInt32BE(data.length, 12);
    this.socket.write(Buffer.concat([header, data]));
  }

  async reply(option: number): Promise<{ type: number; data: Buffer }> {
    const { object, reader } = this;
    const header = await reader.read(OPTION_REPLY_HEADER_BYTES);
    if (header.readBigUInt64BE(0) !== NBD_OPTION_REPLY_MAGIC || header.readUInt32BE(8) !== option) {
      throw protocolError(object, `the answer to option ${option} is not a reply to it`);
    }
    const lengthBytes = header.readUInt32BE(16);
    if (lengthBytes > MAX_OPTION_BYTES) {
      throw protocolError(object, `an option reply of ${lengthBytes} bytes (limit ${MAX_OPTION_BYTES})`);
    }
    return { type: header.readUInt32BE(12), data: await reader.read(lengthBytes) };
  }
}

async function startTls(talk: Negotiation): Promise<void> {
  talk.send(NBD_OPT_STARTTLS);
  const { type, data } = await talk.reply(NBD_OPT_STARTTLS);
  if (type === NBD_REP_ACK) return;
  throw unsupported(talk.object, `the server has no TLS${because(data)}`, "for a safe network there is nbd:");
}

/** An option without data that the server takes or does not. */
async function acknowledged(talk: Negotiation, option: number): Promise<boolean> {
  talk.send(option);
  const { type, data } = await talk.reply(option);
  if (type === NBD_REP_ERR_TLS_REQD) throw refusal(type, data, talk.object, "");
  if (type !== NBD_REP_ACK && type < FIRST_ERROR_REPLY) {
    throw protocolError(talk.object, `an option reply of unknown type ${type}`);
  }
  return type === NBD_REP_ACK;
}

async function setContexts(
  talk: Negotiation,
  exportName: string,
  wanted: readonly string[],
): Promise<ReadonlyMap<number, string>> {
  talk.send(
    NBD_OPT_SET_META_CONTEXT,
    Buffer.concat([text(exportName), uint32(wanted.length), ...wanted.map(text)]),
  );
  const found = new Map<number, string>();
  for (let replyCount = 0; replyCount < MAX_OPTION_REPLIES; replyCount++) {
    const { type, data } = await talk.reply(NBD_OPT_SET_META_CONTEXT);
    if (type === NBD_REP_ACK) return found;
    // A server that has no contexts for this export, or none at all, does without; GO says what else is wrong.
    if (type >= FIRST_ERROR_REPLY) return new Map();
    if (type !== NBD_REP_META_CONTEXT || data.length < 5) {
      throw protocolError(talk.object, "the answer to SET_META_CONTEXT is no metadata context");
    }
    const name = data.toString("utf8", 4);
    if (!wanted.includes(name)) {
      throw protocolError(
        talk.object,
        `a metadata context that was not asked for: ${printable(data.subarray(4))}`,
      );
    }
    found.set(data.readUInt32BE(0), name);
  }
  throw protocolError(talk.object, `more than ${MAX_OPTION_REPLIES} replies to one option`);
}

function uint32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value);
  return bytes;
}

function text(value: string): Buffer {
  const bytes = Buffer.from(value);
  return Buffer.concat([uint32(bytes.length), bytes]);
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

function goData(exportName: string): Buffer {
  const requests = Buffer.alloc(4);
  requests.writeUInt16BE(1, 0);
  requests.writeUInt16BE(NBD_INFO_BLOCK_SIZE, 2);
  return Buffer.concat([text(exportName), requests]);
}

async function readGoReplies(talk: Negotiation, exportName: string): Promise<ExportInfo> {
  const { object } = talk;
  const info: ExportInfo = {
    sizeBytes: -1,
    transmissionFlags: 0,
    minimumBlockBytes: 1,
    preferredBlockBytes: 4096,
    maximumPayloadBytes: MAX_PAYLOAD_BYTES,
  };
  for (let replyCount = 0; replyCount < MAX_OPTION_REPLIES; replyCount++) {
    const { type, data } = await talk.reply(NBD_OPT_GO);
    if (type === NBD_REP_INFO) {
      takeInfo(info, data, object);
    } else if (type === NBD_REP_ACK) {
      if (info.sizeBytes < 0) throw protocolError(object, "the server did not say the export's size");
      return info;
    } else {
      const refused = refusal(type, data, object, exportName);
      throw type === NBD_REP_ERR_UNKNOWN ? await withExportNames(talk, refused) : refused;
    }
  }
  throw protocolError(object, `more than ${MAX_OPTION_REPLIES} replies to one option`);
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
  const isPowerOfTwo = minimum > 0 && (minimum & (minimum - 1)) === 0;
  if (!isPowerOfTwo || minimum > 65_536 || preferred < minimum || maximum < minimum) {
    throw protocolError(object, `block sizes ${minimum}, ${preferred}, ${maximum}`);
  }
  info.minimumBlockBytes = minimum;
  info.preferredBlockBytes = preferred;
  info.maximumPayloadBytes = roundDown(Math.min(maximum, MAX_PAYLOAD_BYTES), minimum);
}

function refusal(type: number, data: Buffer, object: string, exportName: string): CowcatcherError {
  const why = because(data);
  switch (type) {
    case NBD_REP_ERR_UNKNOWN:
      return new CowcatcherError({
        code: "NOT_FOUND",
        object,
        problem: `the server has no export named '${exportName}'${why}`,
      });
    case NBD_REP_ERR_TLS_REQD:
      return unsupported(object, `the server wants TLS${why}`, "write nbds: instead of nbd:");
    case NBD_REP_ERR_UNSUP:
      return unsupported(object, `the server does not know the GO option${why}`);
    case NBD_REP_ERR_BLOCK_SIZE_REQD:
      return unsupported(object, `the server does not accept this client's block sizes${why}`);
    case NBD_REP_ERR_POLICY:
      return new CowcatcherError({
        code: "IO",
        object,
        problem: `the server's policy forbids it${why}`,
        errno: "EACCES",
      });
    case NBD_REP_ERR_SHUTDOWN:
      return new CowcatcherError({
        code: "IO",
        object,
        problem: `the server is shutting down${why}`,
        errno: "ESHUTDOWN",
      });
    default:
      return type >= FIRST_ERROR_REPLY
        ? new CowcatcherError({
            code: "IO",
            object,
            problem: `the server refused the export (0x${type.toString(16)})${why}`,
            errno: "EINVAL",
          })
        : protocolError(object, `an option reply of unknown type ${type}`);
  }
}

function because(data: Buffer): string {
  const said = printable(data);
  return said === "" ? "" : `: ${said}`;
}

/** What the server says, fit for one line on a terminal. */
export function printable(data: Buffer): string {
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

function unsupported(object: string, problem: string, hint?: string): CowcatcherError {
  return new CowcatcherError({ code: "UNSUPPORTED", object, problem, hint });
}
