// A hand-driven client that speaks extended headers; no released peer on the test machines does.
import * as nbd from "../../src/nbd/wire/protocol.js";
import { goData, metaData, optionBytes, type RawClient } from "./nbd-peer.js";

export interface ExtendedFields {
  flags?: number;
  offset?: number | bigint;
  length?: number | bigint;
  payload?: Buffer;
}

export interface ExtendedChunk {
  type: number;
  payload: Buffer;
}

export function extendedRequestBytes(command: number, cookie: bigint, fields: ExtendedFields = {}): Buffer {
  const { flags = 0, offset = 0, payload = Buffer.alloc(0) } = fields;
  const header = Buffer.alloc(32);
  header.writeUInt32BE(nbd.NBD_EXTENDED_REQUEST_MAGIC, 0);
  header.writeUInt16BE(flags, 4);
  header.writeUInt16BE(command, 6);
  header.writeBigUInt64BE(cookie, 8);
  header.writeBigUInt64BE(BigInt(offset), 16);
  header.writeBigUInt64BE(BigInt(fields.length ?? payload.length), 24);
  return Buffer.concat([header, payload]);
}

export class ExtendedClient {
  private cookie = 0x0123_4567_89ab_0000n;

  private constructor(
    readonly raw: RawClient,
    /** Ids of the contexts that were chosen. */
    readonly ids: ReadonlyMap<string, number>,
  ) {}

  static async negotiate(raw: RawClient, contexts: string[]): Promise<ExtendedClient> {
    await raw.read(18);
    raw.send(Buffer.from([0, 0, 0, 3]));
    await raw.option(nbd.NBD_OPT_EXTENDED_HEADERS);
    const ids = new Map<string, number>();
    for (const { type, data } of await raw.option(nbd.NBD_OPT_SET_META_CONTEXT, metaData("disk", contexts))) {
      if (type === nbd.NBD_REP_META_CONTEXT) ids.set(data.toString("utf8", 4), data.readUInt32BE(0));
    }
    raw.send(optionBytes(nbd.NBD_OPT_GO, goData("disk")));
    // INFO_EXPORT, then the acknowledgement.
    await raw.read(20 + 12 + 20);
    return new ExtendedClient(raw, ids);
  }

  send(command: number, fields: ExtendedFields = {}): void {
    this.cookie++;
    this.raw.send(extendedRequestBytes(command, this.cookie, fields));
  }

  /** All chunks of the reply; cookie and offset must be the request's. */
  async ask(command: number, fields: ExtendedFields = {}): Promise<ExtendedChunk[]> {
    this.send(command, fields);
    const chunks: ExtendedChunk[] = [];
    for (;;) {
      const header = await this.raw.read(32);
      if (header.readUInt32BE(0) !== nbd.NBD_EXTENDED_REPLY_MAGIC) throw new Error("not an extended reply");
      if (header.readBigUInt64BE(8) !== this.cookie) throw new Error("another request's cookie");
      if (header.readBigUInt64BE(16) !== BigInt(fields.offset ?? 0)) throw new Error("another offset");
      const payload = await this.raw.read(Number(header.readBigUInt64BE(24)));
      chunks.push({ type: header.readUInt16BE(6), payload });
      if ((header.readUInt16BE(4) & nbd.NBD_REPLY_FLAG_DONE) !== 0) return chunks;
    }
  }

  /** The error of a request whose reply has no data; 0 for success. */
  async request(command: number, fields: ExtendedFields = {}): Promise<number> {
    const [chunk, ...others] = await this.ask(command, fields);
    if (chunk === undefined || others.length > 0) throw new Error("not one chunk");
    if (chunk.type === nbd.NBD_REPLY_TYPE_NONE) return 0;
    if (chunk.type !== nbd.NBD_REPLY_TYPE_ERROR) throw new Error(`chunk of type ${chunk.type}`);
    return chunk.payload.readUInt32BE(0);
  }

  /** The answer to BLOCK_STATUS, whose descriptor counts must be right. */
  async status(fields: ExtendedFields): Promise<{ id: number; extents: [number, number][] }[]> {
    const chunks = await this.ask(nbd.NBD_CMD_BLOCK_STATUS, fields);
    return chunks.map(({ type, payload }) => {
      if (type !== nbd.NBD_REPLY_TYPE_BLOCK_STATUS_EXT) throw new Error(`chunk of type ${type}`);
      const count = payload.readUInt32BE(4);
      if (payload.length !== 8 + 16 * count) throw new Error("the descriptor count is wrong");
      const extents = Array.from({ length: count }, (_, i): [number, number] => [
        Number(payload.readBigUInt64BE(8 + 16 * i)),
        Number(payload.readBigUInt64BE(16 + 16 * i)),
      ]);
      return { id: payload.readUInt32BE(0), extents };
    });
  }
}
