// Valid NBD conversations from a seed, ways to spoil them, and a check of what an unspoilt one is answered with.

import * as nbd from "../../src/nbd/wire/protocol.js";
import { extendedRequestBytes } from "../support/nbd-extended.js";
import { goData, metaData, optionBytes, requestBytes } from "../support/nbd-peer.js";
import type { Random } from "../support/random.js";

type Form = "simple" | "structured" | "extended";

export interface SentRequest {
  cookie: bigint;
  command: number;
  lengthBytes: number;
}

export interface Conversation {
  messages: Buffer[];
  form: Form;
  /** Those that are to be answered. */
  requests: SentRequest[];
}

const CONTEXTS = ["base:allocation", "qemu:dirty-bitmap:stripes", "base:", "qemu:", "x-unknown:y"];

/** @param sizeBytes what requests touch, but for those that leave the disk, of diskBytes, on purpose */
export function makeConversation(random: Random, sizeBytes: number, diskBytes: number): Conversation {
  const form = random.pick(["simple", "structured", "extended"] as const);
  const messages: Buffer[] = [Buffer.from([0, 0, 0, 3])];
  for (let count = random.below(4); count > 0; count--) messages.push(harmlessOption(random));
  if (form === "structured") messages.push(optionBytes(nbd.NBD_OPT_STRUCTURED_REPLY));
  if (form === "extended") messages.push(optionBytes(nbd.NBD_OPT_EXTENDED_HEADERS));
  const contexts = CONTEXTS.filter(() => random.chance(0.5));
  messages.push(optionBytes(nbd.NBD_OPT_SET_META_CONTEXT, metaData("disk", contexts)));
  messages.push(optionBytes(nbd.NBD_OPT_GO, goData("disk", random.chance(0.5) ? [1, 2, 3] : [])));
  const requests: SentRequest[] = [];
  for (let count = 1 + random.below(20); count > 0; count--) {
    const { message, request } = makeRequest(random, sizeBytes, diskBytes, form, BigInt(requests.length + 1));
    messages.push(message);
    requests.push(request);
  }
  messages.push(request(form, nbd.NBD_CMD_DISC, 99n, {}));
  return { messages, form, requests };
}

function harmlessOption(random: Random): Buffer {
  switch (random.below(6)) {
    case 0:
      return optionBytes(nbd.NBD_OPT_LIST);
    case 1:
      return optionBytes(
        nbd.NBD_OPT_INFO,
        goData(random.pick(["disk", "fixed", "none", ""]), [0, 1, 2, 3, 77]),
      );
    case 2:
      return optionBytes(nbd.NBD_OPT_LIST_META_CONTEXT, metaData("disk", [random.pick(CONTEXTS)]));
    case 3:
      return optionBytes(nbd.NBD_OPT_STARTTLS);
    case 4:
      return optionBytes(random.below(100) + 20, Buffer.alloc(random.below(300), random.below(256)));
    default:
      return optionBytes(nbd.NBD_OPT_GO, goData("x".repeat(random.below(5000))));
  }
}

function makeRequest(
  random: Random,
  sizeBytes: number,
  diskBytes: number,
  form: Form,
  cookie: bigint,
): { message: Buffer; request: SentRequest } {
  const command = random.pick([0, 0, 1, 1, 3, 4, 5, 6, 7, 8, 500]);
  const offset = random.below(sizeBytes);
  const inside = 1 + random.below(Math.min(sizeBytes - offset, random.pick([512, 70_000, 200_000])));
  const length = random.chance(0.1) ? diskBytes - offset + 1 + random.below(1000) : inside;
  const isWrite = command === nbd.NBD_CMD_WRITE;
  const allowed = command === nbd.NBD_CMD_WRITE_ZEROES ? [0, 1, 2, 16] : [0, 1];
  const flags = random.pick(allowed) | (isWrite && form === "extended" ? nbd.NBD_CMD_FLAG_PAYLOAD_LEN : 0);
  const isFlush = command === nbd.NBD_CMD_FLUSH;
  const fields = {
    flags,
    ...(!isFlush && { offset }),
    ...(isWrite ? { payload: Buffer.alloc(length, Number(cookie)) } : { length: isFlush ? 0 : length }),
  };
  return {
    message: request(form, command, cookie, fields),
    request: { cookie, command, lengthBytes: length },
  };
}

function request(
  form: Form,
  command: number,
  cookie: bigint,
  fields: { flags?: number; offset?: number; length?: number; payload?: Buffer },
): Buffer {
  if (form === "extended") return extendedRequestBytes(command, cookie, fields);
  return requestBytes(command, { ...fields, cookie });
}

/** Spoils one to four places. */
export function mutate(messages: readonly Buffer[], random: Random): Buffer[] {
  const spoilt: Buffer[] = messages.map((message) => Buffer.from(message));
  for (let count = 1 + random.below(4); count > 0; count--) {
    const index = random.below(spoilt.length);
    const message = spoilt[index] ?? Buffer.alloc(0);
    switch (random.below(8)) {
      case 0:
        flipBit(message, random);
        break;
      case 1:
        setField(message, random);
        break;
      case 2:
        spoilt.splice(index, 1);
        break;
      case 3:
        spoilt.splice(index, 0, message);
        break;
      case 4:
        spoilt.push(...spoilt.splice(index, 1));
        break;
      case 5:
        spoilt[index] = message.subarray(0, random.below(message.length + 1));
        break;
      case 6:
        spoilt.splice(index, 0, noise(random));
        break;
      default:
        flipBit(message.subarray(0, 32), random);
    }
    if (spoilt.length === 0) break;
  }
  return spoilt;
}

function noise(random: Random): Buffer {
  return Buffer.from(Array.from({ length: 1 + random.below(100) }, () => random.below(256)));
}

function flipBit(message: Buffer, random: Random): void {
  if (message.length === 0) return;
  const at = random.below(message.length);
  message[at] = (message[at] ?? 0) ^ (1 << random.below(8));
}

/** A 32-bit field at a likely place gets a value at an edge. */
function setField(message: Buffer, random: Random): void {
  const places = [0, 4, 8, 12, 16, 20, 24, 28].filter((at) => at + 4 <= message.length);
  if (places.length === 0) return;
  const edge = random.pick([0, 1, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, 4096, 65_537, 33_554_433]);
  message.writeUInt32BE(edge, random.pick(places));
}

/** Undefined if every request is answered once and in its form; else what is wrong. */
export function checkReplies(conversation: Conversation, received: Buffer): string | undefined {
  const open = new Map(conversation.requests.map((sent) => [sent.cookie, sent]));
  let at = skipNegotiation(received);
  while (at < received.length) {
    const reply = readReply(received, at, open);
    if (typeof reply === "string") return `${reply} (byte ${at} of ${received.length})`;
    if (reply.isLast && !open.delete(reply.cookie)) return `cookie ${reply.cookie} is answered twice`;
    at = reply.end;
  }
  return open.size === 0 ? undefined : `${open.size} requests are not answered`;
}

/** The greeting, then option replies, as long as their magic comes. */
function skipNegotiation(received: Buffer): number {
  let at = 18;
  while (at + 20 <= received.length && received.readBigUInt64BE(at) === nbd.NBD_OPTION_REPLY_MAGIC) {
    at += 20 + received.readUInt32BE(at + 16);
  }
  return at;
}

function readReply(
  received: Buffer,
  at: number,
  open: ReadonlyMap<bigint, SentRequest>,
): { cookie: bigint; isLast: boolean; end: number } | string {
  if (at + 16 > received.length) return "a reply is cut short";
  const magic = received.readUInt32BE(at);
  const cookie = received.readBigUInt64BE(at + 8);
  const sent = open.get(cookie);
  if (sent === undefined) return `a reply with cookie ${cookie}`;
  if (magic === nbd.NBD_SIMPLE_REPLY_MAGIC) {
    const hasData = sent.command === nbd.NBD_CMD_READ && received.readUInt32BE(at + 4) === 0;
    return { cookie, isLast: true, end: at + 16 + (hasData ? sent.lengthBytes : 0) };
  }
  const isLast = (received.readUInt16BE(at + 4) & nbd.NBD_REPLY_FLAG_DONE) !== 0;
  if (magic === nbd.NBD_STRUCTURED_REPLY_MAGIC) {
    return { cookie, isLast, end: at + 20 + received.readUInt32BE(at + 16) };
  }
  if (magic === nbd.NBD_EXTENDED_REPLY_MAGIC) {
    return { cookie, isLast, end: at + 32 + Number(received.readBigUInt64BE(at + 24)) };
  }
  return `a reply with magic 0x${magic.toString(16)}`;
}
