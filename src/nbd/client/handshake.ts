// The client's negotiation. Specification: doc/proto.md, "Handshake phase".
//
//   fixed newstyle   greeting ─► [STARTTLS ─► TLS] ─► STRUCTURED_REPLY ─► SET_META_CONTEXT ─► GO ─► transmission
//                                                                              unknown there └─► EXPORT_NAME ─► …
//   newstyle         greeting ─► EXPORT_NAME ─► transmission
//   oldstyle         greeting, which has size and flags ─► transmission
//
// The last two are spoken where the server has no better and nothing that was asked for needs it: they have no TLS,
// and oldstyle has no names. EXPORT_NAME knows no error: a server that has no such export hangs up.
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
  EXPORT_NAME_PADDING_BYTES,
  NBD_FLAG_FIXED_NEWSTYLE,
  NBD_FLAG_HAS_FLAGS,
  NBD_FLAG_NO_ZEROES,
  NBD_INFO_BLOCK_SIZE,
  NBD_INFO_EXPORT,
  NBD_INIT_MAGIC,
  NBD_OLDSTYLE_MAGIC,
  NBD_OPTION_MAGIC,
  NBD_OPTION_REPLY_MAGIC,
  NBD_OPT_EXPORT_NAME,
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
import { SocketReader } from "./socket-reader.js";
import { secure } from "./tls.js";
import type { NbdAddress } from "../wire/uri.js";

/** Two magic numbers, which say how it goes on. */
const GREETING_BYTES = 16;
const HANDSHAKE_FLAGS_BYTES = 2;
/** Of the export: its size and its transmission flags. */
const EXPORT_BYTES = 10;
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
 * @throws CowcatcherError PROTOCOL, UNSUPPORTED (TLS required, or refused; a name that the server cannot be told),
 *   NOT_FOUND (no such export), IO (the connection ended, the server refused), and as `secure`.
 */
export async function negotiate(
  socket: Socket,
  object: string,
  address: NbdAddress,
  { structured, contexts }: NegotiateOptions,
): Promise<Negotiated> {
  let talk = new Negotiation(socket, object);
  try {
    const style = await readGreeting(talk);
    if (style === "oldstyle") return await enterOldstyle(talk, address);
    const { isFixed, hasNoZeroes } = style;
    const flags = Buffer.alloc(4);
    flags.writeUInt32BE((isFixed ? NBD_FLAG_C_FIXED_NEWSTYLE : 0) | (hasNoZeroes ? NBD_FLAG_C_NO_ZEROES : 0));
    socket.write(flags);
    if (!isFixed) {
      if (address.tls !== undefined) throw noTls(object, "newstyle negotiation without options");
      const info = await enterByName(talk, address.exportName, hasNoZeroes);
      return { socket, info, structured: false, contexts: new Map() };
    }
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
    const info =
      (await readGoReplies(talk, address.exportName)) ??
      (await enterByName(talk, address.exportName, hasNoZeroes));
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

/** @throws CowcatcherError PROTOCOL */
async function readGreeting({
  reader,
  object,
}: Negotiation): Promise<"oldstyle" | { isFixed: boolean; hasNoZeroes: boolean }> {
  const greeting = await reader.read(GREETING_BYTES);
  if (greeting.readBigUInt64BE(0) !== NBD_INIT_MAGIC) {
    throw protocolError(object, "the server does not speak NBD");
  }
  const style = greeting.readBigUInt64BE(8);
  if (style === NBD_OLDSTYLE_MAGIC) return "oldstyle";
  if (style !== NBD_OPTION_MAGIC)
    throw protocolError(object, "the server's negotiation is of no known style");
  const flags = (await reader.read(HANDSHAKE_FLAGS_BYTES)).readUInt16BE(0);
  return {
    isFixed: (flags & NBD_FLAG_FIXED_NEWSTYLE) !== 0,
    hasNoZeroes: (flags & NBD_FLAG_NO_ZEROES) !== 0,
  };
}

/** An oldstyle server has one export, and says in its greeting all that it has to say. */
async function enterOldstyle(
  { socket, reader, object }: Negotiation,
  address: NbdAddress,
): Promise<Negotiated> {
  if (address.tls !== undefined) throw noTls(object, "oldstyle negotiation");
  if (address.exportName !== "") {
    throw unsupported(
      object,
      `an oldstyle server cannot be asked for export '${address.exportName}'`,
      "leave the name out: it has one export",
    );
  }
  const sizeBytes = await reader.read(8);
  // Flags of the handshake, of which oldstyle knows none, then those of the export.
  const flags = (await reader.read(4)).subarray(2);
  await reader.read(EXPORT_NAME_PADDING_BYTES);
  const info = defaultInfo();
  takeExport(info, Buffer.concat([sizeBytes, flags]), object);
  return { socket, info, structured: false, contexts: new Map() };
}

/** By EXPORT_NAME, after which there is no way back. */
async function enterByName(talk: Negotiation, exportName: string, hasNoZeroes: boolean): Promise<ExportInfo> {
  const { reader, object } = talk;
  talk.send(NBD_OPT_EXPORT_NAME, Buffer.from(exportName));
  const info = defaultInfo();
  takeExport(info, await reader.read(EXPORT_BYTES, noSuchExport(object, exportName)), object);
  if (!hasNoZeroes) await reader.read(EXPORT_NAME_PADDING_BYTES);
  return info;
}

function noSuchExport(object: string, exportName: string): CowcatcherError {
  return new CowcatcherError({
    code: "NOT_FOUND",
    object,
    problem: `the server hung up when it was asked for export '${exportName}', as one does that has no such export`,
  });
}

function noTls(object: string, style: string): CowcatcherError {
  return unsupported(object, `the server has no TLS: it speaks ${style}`);
}

function goData(exportName: string): Buffer {
  const requests = Buffer.alloc(4);
  requests.writeUInt16BE(1, 0);
  requests.writeUInt16BE(NBD_INFO_BLOCK_SIZE, 2);
  return Buffer.concat([text(exportName), requests]);
}

/** What the specification has a client assume of a server that does not say more. */
function defaultInfo(): ExportInfo {
  return {
    sizeBytes: -1,
    transmissionFlags: 0,
    minimumBlockBytes: 1,
    preferredBlockBytes: 4096,
    maximumPayloadBytes: MAX_PAYLOAD_BYTES,
  };
}

/** @returns undefined where the server does not know GO */
async function readGoReplies(talk: Negotiation, exportName: string): Promise<ExportInfo | undefined> {
  const { object } = talk;
  const info = defaultInfo();
  for (let replyCount = 0; replyCount < MAX_OPTION_REPLIES; replyCount++) {
    const { type, data } = await talk.reply(NBD_OPT_GO);
    if (type === NBD_REP_INFO) {
      takeInfo(info, data, object);
    } else if (type === NBD_REP_ACK) {
      if (info.sizeBytes < 0) throw protocolError(object, "the server did not say the export's size");
      checkBlocksFit(info, object);
      return info;
    } else if (type === NBD_REP_ERR_UNSUP) {
      return undefined;
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
    takeExport(info, data.subarray(2), object);
  } else if (type === NBD_INFO_BLOCK_SIZE) {
    takeBlockSizes(info, data, object);
  }
}

/** @param data size, and transmission flags */
function takeExport(info: ExportInfo, data: Buffer, object: string): void {
  info.sizeBytes = Number(data.readBigUInt64BE(0));
  info.transmissionFlags = data.readUInt16BE(8);
  if (!Number.isSafeInteger(info.sizeBytes)) {
    throw new CowcatcherError({ code: "LIMIT", object, problem: "the export is larger than 2^53 bytes" });
  }
  if ((info.transmissionFlags & NBD_FLAG_HAS_FLAGS) === 0) info.transmissionFlags = 0;
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

/** Specification: the size must be a multiple of the minimum block size. The last block could not be asked for. */
function checkBlocksFit({ sizeBytes, minimumBlockBytes }: ExportInfo, object: string): void {
  if (sizeBytes % minimumBlockBytes === 0) return;
  throw new CowcatcherError({
    code: "PROTOCOL",
    object,
    problem: `the export's ${sizeBytes} bytes are no multiple of the server's smallest block, ${minimumBlockBytes} bytes`,
    hint: "let the server round the size (nbdkit --filter=truncate round-up), or serve smaller blocks",
  });
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

export function protocolError(object: string, problem: string): CowcatcherError {
  return new CowcatcherError({ code: "PROTOCOL", object, problem });
}

function unsupported(object: string, problem: string, hint?: string): CowcatcherError {
  return new CowcatcherError({ code: "UNSUPPORTED", object, problem, hint });
}
