// The negotiation: fixed newstyle, from the server's greeting to the option that ends it.
//
// A push parser without I/O of its own: `consume` takes bytes as they arrive, handles each option that is complete
// and appends the answers to a ReplyQueue. Nothing in it waits, so it has few states:
//
//   client flags ──► options ──► outcome (transmission | end | drop)
//        │
//        └─ TLS required ─► options in plain text ──► outcome startTls ── secured() ──► options
//
// TLS is off or required, never left to the client: where it is required, nothing but STARTTLS and ABORT is
// answered before it, and nothing of what was said before it counts after it.
//
// Bounds: an option's data, the number of options, answers that lie unread, and (in connection.ts) the time.
// Options are independent, but for what three of them leave behind: STRUCTURED_REPLY, EXTENDED_HEADERS, and
// SET_META_CONTEXT for one export.
//
// Specification: doc/proto.md, "Handshake phase" and "TLS support"; extended headers: branch extension-ext-header.

import type { NbdExport } from "./export.js";
import { blockSizes, transmissionFlags } from "./export.js";
import { MAX_OPTIONS } from "./limits.js";
import { chooseContexts, type MetaContext } from "./meta-contexts.js";
import { OptionData, readQueries } from "./option-data.js";
import {
  EXPORT_NAME_PADDING_BYTES,
  MAX_OPTION_BYTES,
  MAX_STRING_BYTES,
  NBD_FLAG_C_FIXED_NEWSTYLE,
  NBD_FLAG_C_NO_ZEROES,
  NBD_FLAG_FIXED_NEWSTYLE,
  NBD_FLAG_NO_ZEROES,
  NBD_INFO_BLOCK_SIZE,
  NBD_INFO_DESCRIPTION,
  NBD_INFO_EXPORT,
  NBD_INFO_NAME,
  NBD_INIT_MAGIC,
  NBD_OPTION_MAGIC,
  NBD_OPTION_REPLY_MAGIC,
  NBD_OPT_ABORT,
  NBD_OPT_EXPORT_NAME,
  NBD_OPT_EXTENDED_HEADERS,
  NBD_OPT_GO,
  NBD_OPT_INFO,
  NBD_OPT_LIST,
  NBD_OPT_LIST_META_CONTEXT,
  NBD_OPT_SET_META_CONTEXT,
  NBD_OPT_STARTTLS,
  NBD_OPT_STRUCTURED_REPLY,
  NBD_REP_ACK,
  NBD_REP_ERR_EXT_HEADER_REQD,
  NBD_REP_ERR_INVALID,
  NBD_REP_ERR_POLICY,
  NBD_REP_ERR_SHUTDOWN,
  NBD_REP_ERR_TLS_REQD,
  NBD_REP_ERR_TOO_BIG,
  NBD_REP_ERR_UNKNOWN,
  NBD_REP_ERR_UNSUP,
  NBD_REP_INFO,
  NBD_REP_META_CONTEXT,
  NBD_REP_SERVER,
  OPTION_HEADER_BYTES,
  OPTION_REPLY_HEADER_BYTES,
} from "../wire/protocol.js";
import type { ReplyForm } from "./reply-form.js";

/** What the negotiation ended with. */
export interface Negotiated {
  nbdExport: NbdExport;
  replyForm: ReplyForm;
  /** What the client chose for this export; BLOCK_STATUS is allowed if there is any. */
  contexts: readonly MetaContext[];
}

export type HandshakeOutcome =
  | { kind: "transmission"; negotiated: Negotiated }
  /** STARTTLS is acknowledged: once that is sent, the next byte is TLS's. Then `secured` goes on. */
  | { kind: "startTls" }
  /** The client asked for the end: send what is queued, then hang up. */
  | { kind: "end" }
  /** The client broke the protocol or asked for what has no error reply: hang up after what is queued. */
  | { kind: "drop"; reason: string };

/** Where answers go; reply-queue.ts's ReplyQueue is one. */
export interface ByteSink {
  append(bytes: Uint8Array): void;
  /** The client leaves too much of it unread. */
  readonly isFullForOptions?: boolean;
}

export class Handshake {
  outcome: HandshakeOutcome | undefined;
  /** Set while the server closes: every option is answered with ERR_SHUTDOWN. */
  shuttingDown = false;
  /** Whole options may be left over: the client is to take its answers first. */
  isWaiting = false;
  private clientFlags: number | undefined;
  private optionCount = 0;
  private isSecure = false;
  private replyForm: ReplyForm = "simple";
  /** What the last successful SET_META_CONTEXT chose, and of which export. */
  private contexts: readonly MetaContext[] = [];
  private contextExport: NbdExport | undefined;

  constructor(
    private readonly exports: ReadonlyMap<string, NbdExport>,
    private readonly replies: ByteSink,
    private readonly requiresTls = false,
    /** Why the client may not enter an export now; undefined: it may. */
    private readonly refusal: () => string | undefined = () => undefined,
  ) {}

  /** Sends the server's first 18 bytes. */
  greet(): void {
    const greeting = Buffer.alloc(18);
    greeting.writeBigUInt64BE(NBD_INIT_MAGIC, 0);
    greeting.writeBigUInt64BE(NBD_OPTION_MAGIC, 8);
    greeting.writeUInt16BE(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES, 16);
    this.replies.append(greeting);
  }

  /** TLS is there: goes on as if nothing but the client's flags had been said. */
  secured(): void {
    this.isSecure = true;
    this.outcome = undefined;
    this.replyForm = "simple";
    this.contexts = [];
    this.contextExport = undefined;
  }

  /** Handles what is complete in bytes[start, end) until an outcome is reached; returns where it stopped. */
  consume(bytes: Buffer, start: number, end: number): number {
    let at = start;
    this.isWaiting = false;
    if (this.clientFlags === undefined) {
      if (end - at < 4) return at;
      this.acceptClientFlags(bytes.readUInt32BE(at));
      at += 4;
    }
    while (this.outcome === undefined && end - at >= OPTION_HEADER_BYTES) {
      if (this.replies.isFullForOptions === true) {
        this.isWaiting = true;
        break;
      }
      const lengthBytes = bytes.readUInt32BE(at + 12);
      if (!this.acceptOptionHeader(bytes.readBigUInt64BE(at), bytes.readUInt32BE(at + 8), lengthBytes)) break;
      if (end - at < OPTION_HEADER_BYTES + lengthBytes) break;
      const dataAt = at + OPTION_HEADER_BYTES;
      at = dataAt + lengthBytes;
      this.optionCount++;
      this.handleOption(bytes.readUInt32BE(dataAt - 8), bytes.subarray(dataAt, at));
    }
    return at;
  }

  private acceptClientFlags(flags: number): void {
    this.clientFlags = flags;
    const unknown = flags & ~(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES);
    if (unknown !== 0) {
      this.drop(`unknown client flags 0x${flags.toString(16)}`);
    } else if (this.requiresTls && (flags & NBD_FLAG_C_FIXED_NEWSTYLE) === 0) {
      this.drop("TLS is required, and a client without fixed newstyle cannot start it");
    }
  }

  private acceptOptionHeader(magic: bigint, option: number, lengthBytes: number): boolean {
    if (magic !== NBD_OPTION_MAGIC) {
      this.drop(`an option with magic 0x${magic.toString(16)}`);
    } else if (this.optionCount >= MAX_OPTIONS) {
      this.fail(option, NBD_REP_ERR_TOO_BIG, `more than ${MAX_OPTIONS} options`);
      this.drop(`more than ${MAX_OPTIONS} options`);
    } else if (lengthBytes > MAX_OPTION_BYTES) {
      this.fail(option, NBD_REP_ERR_TOO_BIG, `option data is limited to ${MAX_OPTION_BYTES} bytes`);
      this.drop(`an option with ${lengthBytes} bytes of data (limit ${MAX_OPTION_BYTES})`);
    }
    return this.outcome === undefined;
  }

  private handleOption(option: number, data: Buffer): void {
    const isExportName = option === NBD_OPT_EXPORT_NAME;
    if (option === NBD_OPT_ABORT) {
      this.reply(option, NBD_REP_ACK);
      this.outcome = { kind: "end" };
    } else if (this.requiresTls && !this.isSecure && option !== NBD_OPT_STARTTLS) {
      if (isExportName) this.drop("an export was asked for without TLS");
      else this.fail(option, NBD_REP_ERR_TLS_REQD, "this server requires TLS: start it first");
    } else if (isExportName) {
      this.enterByExportName(data);
    } else if (this.shuttingDown) {
      this.fail(option, NBD_REP_ERR_SHUTDOWN, "the server is shutting down");
    } else {
      this.handleFixedOption(option, data);
    }
  }

  private handleFixedOption(option: number, data: Buffer): void {
    switch (option) {
      case NBD_OPT_LIST:
        return this.list(data);
      case NBD_OPT_INFO:
      case NBD_OPT_GO:
        return this.infoOrGo(option, data);
      case NBD_OPT_STRUCTURED_REPLY:
      case NBD_OPT_EXTENDED_HEADERS:
        return this.setReplyForm(option, data);
      case NBD_OPT_STARTTLS:
        return this.startTls(data);
      case NBD_OPT_LIST_META_CONTEXT:
      case NBD_OPT_SET_META_CONTEXT:
        return this.metaContext(option, data);
      default:
        return this.fail(option, NBD_REP_ERR_UNSUP, "this server does not know the option");
    }
  }

  private setReplyForm(option: number, data: Buffer): void {
    if (data.length > 0) return this.fail(option, NBD_REP_ERR_INVALID, "this option has no data");
    if (option === NBD_OPT_EXTENDED_HEADERS) {
      this.replyForm = "extended";
    } else if (this.replyForm === "extended") {
      return this.fail(option, NBD_REP_ERR_EXT_HEADER_REQD, "extended headers are agreed on already");
    } else {
      this.replyForm = "structured";
    }
    this.reply(option, NBD_REP_ACK);
  }

  private startTls(data: Buffer): void {
    if (data.length > 0) return this.fail(NBD_OPT_STARTTLS, NBD_REP_ERR_INVALID, "this option has no data");
    if (!this.requiresTls) {
      return this.fail(NBD_OPT_STARTTLS, NBD_REP_ERR_POLICY, "TLS is not configured on this server");
    }
    if (this.isSecure) return this.fail(NBD_OPT_STARTTLS, NBD_REP_ERR_INVALID, "TLS is in use already");
    this.reply(NBD_OPT_STARTTLS, NBD_REP_ACK);
    this.outcome = { kind: "startTls" };
  }

  /** This option has no error reply: what cannot be granted ends the connection. */
  private enterByExportName(data: Buffer): void {
    const name = data.toString("utf8");
    if (data.length > MAX_STRING_BYTES) return this.drop(`an export name of ${data.length} bytes`);
    if (this.replyForm === "extended") return this.drop("EXPORT_NAME after extended headers were agreed on");
    const nbdExport = this.shuttingDown ? undefined : this.findExport(name);
    if (nbdExport === undefined) return this.drop(`no export named '${name.slice(0, 100)}'`);
    const refusal = this.refusal();
    if (refusal !== undefined) return this.drop(refusal);
    const noZeroes = ((this.clientFlags ?? 0) & NBD_FLAG_C_NO_ZEROES) !== 0;
    const answer = Buffer.alloc(10 + (noZeroes ? 0 : EXPORT_NAME_PADDING_BYTES));
    answer.writeBigUInt64BE(BigInt(nbdExport.device.sizeBytes), 0);
    answer.writeUInt16BE(this.flagsOf(nbdExport), 8);
    this.replies.append(answer);
    this.enter(nbdExport);
  }

  private list(data: Buffer): void {
    if (data.length > 0) return this.fail(NBD_OPT_LIST, NBD_REP_ERR_INVALID, "this option has no data");
    for (const { name, description } of this.exports.values()) {
      const nameBytes = Buffer.from(name);
      const length = Buffer.alloc(4);
      length.writeUInt32BE(nameBytes.length);
      this.reply(NBD_OPT_LIST, NBD_REP_SERVER, Buffer.concat([length, nameBytes, Buffer.from(description)]));
    }
    this.reply(NBD_OPT_LIST, NBD_REP_ACK);
  }

  private infoOrGo(option: number, data: Buffer): void {
    const cursor = new OptionData(data);
    const name = cursor.string();
    const requestCount = cursor.uint16();
    if (name === undefined || requestCount === undefined || cursor.remainingBytes !== 2 * requestCount) {
      return this.fail(option, NBD_REP_ERR_INVALID, "the option's lengths do not add up");
    }
    const nbdExport = this.findExport(name);
    if (nbdExport === undefined) return this.fail(option, NBD_REP_ERR_UNKNOWN, "no export has this name");
    const refusal = option === NBD_OPT_GO ? this.refusal() : undefined;
    if (refusal !== undefined) return this.fail(option, NBD_REP_ERR_POLICY, refusal);
    const requested = new Set<number>();
    for (let i = 0; i < requestCount; i++) requested.add(cursor.uint16() ?? NBD_INFO_EXPORT);
    this.sendInfo(option, nbdExport, requested);
    this.reply(option, NBD_REP_ACK);
    if (option === NBD_OPT_GO) this.enter(nbdExport);
  }

  private sendInfo(option: number, nbdExport: NbdExport, requested: ReadonlySet<number>): void {
    const info = Buffer.alloc(12);
    info.writeUInt16BE(NBD_INFO_EXPORT, 0);
    info.writeBigUInt64BE(BigInt(nbdExport.device.sizeBytes), 2);
    info.writeUInt16BE(this.flagsOf(nbdExport), 10);
    this.reply(option, NBD_REP_INFO, info);
    if (requested.has(NBD_INFO_NAME)) this.sendTextInfo(option, NBD_INFO_NAME, nbdExport.name);
    if (requested.has(NBD_INFO_DESCRIPTION) && nbdExport.description !== "") {
      this.sendTextInfo(option, NBD_INFO_DESCRIPTION, nbdExport.description);
    }
    if (requested.has(NBD_INFO_BLOCK_SIZE)) {
      const { minimum, preferred, maximum } = blockSizes(nbdExport);
      const sizes = Buffer.alloc(14);
      sizes.writeUInt16BE(NBD_INFO_BLOCK_SIZE, 0);
      sizes.writeUInt32BE(minimum, 2);
      sizes.writeUInt32BE(preferred, 6);
      sizes.writeUInt32BE(maximum, 10);
      this.reply(option, NBD_REP_INFO, sizes);
    }
  }

  private sendTextInfo(option: number, type: number, text: string): void {
    const head = Buffer.alloc(2);
    head.writeUInt16BE(type);
    this.reply(option, NBD_REP_INFO, Buffer.concat([head, Buffer.from(text)]));
  }

  private metaContext(option: number, data: Buffer): void {
    const isSet = option === NBD_OPT_SET_META_CONTEXT;
    // A SET that fails takes back what an earlier one chose.
    if (isSet) this.contextExport = undefined;
    if (this.replyForm === "simple") {
      return this.fail(option, NBD_REP_ERR_INVALID, "structured replies must be agreed on first");
    }
    const cursor = new OptionData(data);
    const name = cursor.string();
    const queries = name === undefined ? undefined : readQueries(cursor);
    if (name === undefined || queries === undefined) {
      return this.fail(option, NBD_REP_ERR_INVALID, "the option's lengths do not add up");
    }
    const nbdExport = this.findExport(name);
    if (nbdExport === undefined) return this.fail(option, NBD_REP_ERR_UNKNOWN, "no export has this name");
    const chosen = chooseContexts(nbdExport, queries, isSet);
    for (const context of chosen) {
      const id = Buffer.alloc(4);
      id.writeUInt32BE(isSet ? context.id : 0);
      this.reply(option, NBD_REP_META_CONTEXT, Buffer.concat([id, Buffer.from(context.name)]));
    }
    if (isSet) {
      this.contexts = chosen;
      this.contextExport = nbdExport;
    }
    this.reply(option, NBD_REP_ACK);
  }

  /** The empty name means the default export: the only one, where there is but one. */
  private findExport(name: string): NbdExport | undefined {
    const named = this.exports.get(name);
    if (named !== undefined || name !== "") return named;
    const lasting = [...this.exports.values()].filter(({ isTemporary }) => isTemporary !== true);
    return lasting.length === 1 ? lasting[0] : undefined;
  }

  private contextsFor(nbdExport: NbdExport): readonly MetaContext[] {
    return this.contextExport === nbdExport ? this.contexts : [];
  }

  private flagsOf(nbdExport: NbdExport): number {
    return transmissionFlags(nbdExport, this.replyForm, this.contextsFor(nbdExport).length > 0);
  }

  private enter(nbdExport: NbdExport): void {
    const { replyForm } = this;
    const contexts = this.contextsFor(nbdExport);
    this.outcome = { kind: "transmission", negotiated: { nbdExport, replyForm, contexts } };
  }

  private drop(reason: string): void {
    this.outcome = { kind: "drop", reason };
  }

  private fail(option: number, error: number, message: string): void {
    this.reply(option, error, Buffer.from(message));
  }

  private reply(option: number, type: number, data?: Buffer): void {
    const header = Buffer.alloc(OPTION_REPLY_HEADER_BYTES);
    header.writeBigUInt64BE(NBD_OPTION_REPLY_MAGIC, 0);
    header.writeUInt32BE(option, 8);
    header.writeUInt32BE(type, 12);
    header.writeUInt32BE(data?.length ?? 0, 16);
    this.replies.append(header);
    if (data !== undefined) this.replies.append(data);
  }
}
