import { describe, expect, test } from "vitest";
import type { NbdExport } from "../../../../src/nbd/server/export.js";
import { Handshake } from "../../../../src/nbd/server/handshake.js";
import * as nbd from "../../../../src/nbd/wire/protocol.js";
import { goData, MemoryDevice, metaData, optionBytes, stringBytes } from "../../../support/nbd-peer.js";

const CLIENT_FLAGS = Buffer.from([0, 0, 0, 3]);

function makeExport(name: string, fields: Partial<NbdExport> = {}): NbdExport {
  return {
    name,
    description: "",
    device: new MemoryDevice(8192),
    readOnly: false,
    canMultiConn: true,
    ...fields,
  };
}

class Peer {
  readonly sent: Buffer[] = [];
  readonly handshake: Handshake;
  constructor(exports: NbdExport[], requiresTls = false) {
    const byName = new Map(exports.map((nbdExport) => [nbdExport.name, nbdExport]));
    const sink = { append: (bytes: Uint8Array) => void this.sent.push(Buffer.from(bytes)) };
    this.handshake = new Handshake(byName, sink, requiresTls);
  }

  give(...parts: Buffer[]): number {
    const bytes = Buffer.concat(parts);
    return this.handshake.consume(bytes, 0, bytes.length);
  }

  /** Reply types and data of all option replies so far. */
  replies(): { option: number; type: number; data: Buffer }[] {
    const all = Buffer.concat(this.sent);
    const replies: { option: number; type: number; data: Buffer }[] = [];
    for (let at = 0; at < all.length;) {
      expect(all.readBigUInt64BE(at)).toBe(nbd.NBD_OPTION_REPLY_MAGIC);
      const dataBytes = all.readUInt32BE(at + 16);
      const data = all.subarray(at + 20, at + 20 + dataBytes);
      replies.push({ option: all.readUInt32BE(at + 8), type: all.readUInt32BE(at + 12), data });
      at += 20 + dataBytes;
    }
    return replies;
  }

  types(): number[] {
    return this.replies().map(({ type }) => type);
  }
}

function ready(...exports: NbdExport[]): Peer {
  const peer = new Peer([...exports]);
  peer.give(CLIENT_FLAGS);
  return peer;
}

describe("greeting and client flags", () => {
  test("greets with both magics and fixed newstyle, no zeroes", () => {
    const peer = new Peer([]);
    peer.handshake.greet();
    expect(Buffer.concat(peer.sent).toString("latin1")).toBe("NBDMAGICIHAVEOPT\0\x03");
  });

  test("hangs up on unknown client flags", () => {
    const peer = new Peer([]);
    peer.give(Buffer.from([0, 0, 0, 7]));
    expect(peer.handshake.outcome?.kind).toBe("drop");
  });

  test("takes client flags and options byte by byte", () => {
    const peer = new Peer([makeExport("disk")]);
    const all = Buffer.concat([CLIENT_FLAGS, optionBytes(nbd.NBD_OPT_GO, goData("disk"))]);
    let start = 0;
    for (let end = 1; end <= all.length; end++) {
      expect(peer.handshake.outcome).toBeUndefined();
      start = peer.handshake.consume(all, start, end);
    }
    expect(start).toBe(all.length);
    expect(peer.types()).toEqual([nbd.NBD_REP_INFO, nbd.NBD_REP_ACK]);
    expect(peer.handshake.outcome?.kind).toBe("transmission");
  });

  test("stops at GO and leaves the requests behind it", () => {
    const peer = ready(makeExport("disk"));
    const go = optionBytes(nbd.NBD_OPT_GO, goData("disk"));
    expect(peer.give(go, Buffer.alloc(28))).toBe(go.length);
  });
});

describe("choosing an export", () => {
  test("INFO answers and goes on; GO ends the negotiation", () => {
    const nbdExport = makeExport("disk", { description: "for people" });
    const peer = ready(nbdExport);
    const wanted = [nbd.NBD_INFO_NAME, nbd.NBD_INFO_DESCRIPTION, nbd.NBD_INFO_BLOCK_SIZE, 77];
    peer.give(optionBytes(nbd.NBD_OPT_INFO, goData("disk", wanted)));
    expect(peer.handshake.outcome).toBeUndefined();
    const infos = peer.replies().filter(({ type }) => type === nbd.NBD_REP_INFO);
    expect(infos.map(({ data }) => data.readUInt16BE(0))).toEqual([0, 1, 2, 3]);
    expect(infos[0]?.data.readBigUInt64BE(2)).toBe(8192n);
    expect(infos[1]?.data.toString("utf8", 2)).toBe("disk");
    expect(infos[2]?.data.toString("utf8", 2)).toBe("for people");
    expect([2, 6, 10].map((at) => infos[3]?.data.readUInt32BE(at))).toEqual([1, 4096, nbd.MAX_PAYLOAD_BYTES]);
    peer.give(optionBytes(nbd.NBD_OPT_GO, goData("disk")));
    expect(peer.handshake.outcome).toEqual({
      kind: "transmission",
      negotiated: { nbdExport, replyForm: "simple", contexts: [] },
    });
  });

  test("an unknown name is an error reply to GO and the end after EXPORT_NAME", () => {
    const peer = ready(makeExport("a"), makeExport("b"));
    peer.give(optionBytes(nbd.NBD_OPT_GO, goData("c")), optionBytes(nbd.NBD_OPT_GO, goData("")));
    expect(peer.types()).toEqual([nbd.NBD_REP_ERR_UNKNOWN, nbd.NBD_REP_ERR_UNKNOWN]);
    peer.give(optionBytes(nbd.NBD_OPT_EXPORT_NAME, Buffer.from("c")));
    expect(peer.handshake.outcome?.kind).toBe("drop");
  });

  test("the empty name is the only export", () => {
    const peer = ready(makeExport("disk"));
    peer.give(optionBytes(nbd.NBD_OPT_GO, goData("")));
    expect(peer.handshake.outcome?.kind).toBe("transmission");
  });

  test.each([
    [3, 10],
    [1, 134],
  ])("EXPORT_NAME with client flags %i is answered in %i bytes", (flags, answerBytes) => {
    const peer = new Peer([makeExport("disk")]);
    peer.give(Buffer.from([0, 0, 0, flags]), optionBytes(nbd.NBD_OPT_EXPORT_NAME, Buffer.from("disk")));
    const answer = Buffer.concat(peer.sent);
    expect(answer.length).toBe(answerBytes);
    expect(answer.readBigUInt64BE(0)).toBe(8192n);
  });

  test("flags tell what is allowed", () => {
    const flagsOf = (nbdExport: NbdExport, structured: boolean): number => {
      const peer = ready(nbdExport);
      if (structured) peer.give(optionBytes(nbd.NBD_OPT_STRUCTURED_REPLY));
      peer.give(optionBytes(nbd.NBD_OPT_INFO, goData("disk")));
      return (
        peer
          .replies()
          .find(({ type }) => type === nbd.NBD_REP_INFO)
          ?.data.readUInt16BE(10) ?? 0
      );
    };
    const writable = flagsOf(makeExport("disk"), true);
    expect(writable & nbd.NBD_FLAG_SEND_DF).not.toBe(0);
    expect(writable & nbd.NBD_FLAG_CAN_MULTI_CONN).not.toBe(0);
    expect(writable & nbd.NBD_FLAG_READ_ONLY).toBe(0);
    const readOnly = flagsOf(makeExport("disk", { readOnly: true, canMultiConn: false }), false);
    expect(readOnly & nbd.NBD_FLAG_READ_ONLY).not.toBe(0);
    expect(readOnly & (nbd.NBD_FLAG_SEND_DF | nbd.NBD_FLAG_SEND_TRIM | nbd.NBD_FLAG_CAN_MULTI_CONN)).toBe(0);
  });

  test("LIST names every export and refuses data", () => {
    const peer = ready(makeExport("a"), makeExport("b", { description: "x" }));
    peer.give(optionBytes(nbd.NBD_OPT_LIST), optionBytes(nbd.NBD_OPT_LIST, Buffer.from([1])));
    expect(peer.types()).toEqual([2, 2, nbd.NBD_REP_ACK, nbd.NBD_REP_ERR_INVALID]);
    expect(peer.replies()[1]?.data.toString("latin1")).toBe("\0\0\0\x01bx");
  });
});

describe("metadata contexts", () => {
  const structured = (): Peer => {
    const peer = ready(makeExport("disk"), makeExport("other"));
    peer.give(optionBytes(nbd.NBD_OPT_STRUCTURED_REPLY));
    peer.sent.length = 0;
    return peer;
  };

  test("need structured replies first", () => {
    const peer = ready(makeExport("disk"));
    peer.give(optionBytes(nbd.NBD_OPT_SET_META_CONTEXT, metaData("disk", ["base:allocation"])));
    expect(peer.types()).toEqual([nbd.NBD_REP_ERR_INVALID]);
  });

  test.each([
    ["LIST", nbd.NBD_OPT_LIST_META_CONTEXT, [], 1],
    ["LIST", nbd.NBD_OPT_LIST_META_CONTEXT, ["base:"], 1],
    ["LIST", nbd.NBD_OPT_LIST_META_CONTEXT, ["x-other:y"], 0],
    ["SET", nbd.NBD_OPT_SET_META_CONTEXT, [], 0],
    ["SET", nbd.NBD_OPT_SET_META_CONTEXT, ["x:y", "base:allocation"], 1],
    ["SET", nbd.NBD_OPT_SET_META_CONTEXT, ["base:"], 0],
  ])("%s (%i) of %j finds %i", (_name, option, queries, found) => {
    const peer = structured();
    peer.give(optionBytes(option, metaData("disk", queries)));
    const contexts = peer.replies().filter(({ type }) => type === nbd.NBD_REP_META_CONTEXT);
    expect(contexts.map(({ data }) => data.toString("utf8", 4))).toEqual(
      found === 1 ? ["base:allocation"] : [],
    );
    expect(peer.types().at(-1)).toBe(nbd.NBD_REP_ACK);
  });

  test.each([
    ["the same export", "disk", ["base:allocation"], true],
    ["another export", "other", ["base:allocation"], false],
  ])("chosen for %s", (_what, name, queries, isChosen) => {
    const peer = structured();
    peer.give(optionBytes(nbd.NBD_OPT_SET_META_CONTEXT, metaData(name, queries)));
    peer.give(optionBytes(nbd.NBD_OPT_GO, goData("disk")));
    expect(chosenContexts(peer)).toEqual(isChosen ? ["base:allocation"] : []);
  });

  test("a SET that fails takes back an earlier choice", () => {
    const peer = structured();
    peer.give(optionBytes(nbd.NBD_OPT_SET_META_CONTEXT, metaData("disk", ["base:allocation"])));
    peer.give(optionBytes(nbd.NBD_OPT_SET_META_CONTEXT, Buffer.from([1, 2])));
    peer.give(optionBytes(nbd.NBD_OPT_GO, goData("disk")));
    expect(chosenContexts(peer)).toEqual([]);
  });

  const bitmaps = ["qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b"];
  const all = ["base:allocation", ...bitmaps, "x-cowcatcher:c"];
  test.each([
    ["LIST", [], all],
    ["LIST", ["base:"], ["base:allocation"]],
    ["LIST", ["qemu:"], bitmaps],
    ["LIST", ["qemu:dirty-bitmap:"], bitmaps],
    ["LIST", ["qemu:dirty-bitmap:b", "qemu:dirty-bitmap:c"], ["qemu:dirty-bitmap:b"]],
    ["LIST", ["qemu:allocation-depth", "qem", "qemu", "x-cowcatcher:"], []],
    ["SET", [], []],
    ["SET", ["qemu:", "qemu:dirty-bitmap:", "base:"], []],
    ["SET", ["qemu:dirty-bitmap:b", "base:allocation", "base:allocation"], [all[0], all[2]]],
    ["SET", all, all],
  ])("%s of %j among several: %j", (kind, queries, found) => {
    const contexts = [...bitmaps, "x-cowcatcher:c"].map((name) => ({
      name,
      status: () => ({ lengthBytes: 1, flags: 0 }),
    }));
    const peer = ready(makeExport("disk", { contexts }));
    const isSet = kind === "SET";
    const option = isSet ? nbd.NBD_OPT_SET_META_CONTEXT : nbd.NBD_OPT_LIST_META_CONTEXT;
    peer.give(optionBytes(nbd.NBD_OPT_STRUCTURED_REPLY));
    peer.sent.length = 0;
    peer.give(optionBytes(option, metaData("disk", queries)));
    const replies = peer.replies().slice(0, -1);
    expect(replies.map(({ data }) => data.toString("utf8", 4))).toEqual(found);
    const ids = replies.map(({ data }) => data.readUInt32BE(0));
    expect(new Set(ids).size).toBe(isSet ? found.length : Math.min(1, found.length));
    peer.give(optionBytes(nbd.NBD_OPT_GO, goData("disk")));
    expect(chosenContexts(peer)).toEqual(isSet ? found : []);
  });
});

function chosenContexts(peer: Peer): string[] {
  const { outcome } = peer.handshake;
  if (outcome?.kind !== "transmission") throw new Error("no transmission");
  return outcome.negotiated.contexts.map(({ name }) => name);
}

describe("extended headers", () => {
  const form = (peer: Peer): unknown =>
    peer.handshake.outcome?.kind === "transmission" ? peer.handshake.outcome.negotiated.replyForm : undefined;

  test("take precedence over structured replies, which cannot be had afterwards", () => {
    const peer = ready(makeExport("disk"));
    for (const option of [8, 11, 8, 11]) peer.give(optionBytes(option));
    expect(peer.types()).toEqual([
      nbd.NBD_REP_ACK,
      nbd.NBD_REP_ACK,
      nbd.NBD_REP_ERR_EXT_HEADER_REQD,
      nbd.NBD_REP_ACK,
    ]);
    peer.give(optionBytes(nbd.NBD_OPT_GO, goData("disk")));
    expect(form(peer)).toBe("extended");
  });

  test("need no structured replies first, for contexts neither", () => {
    const peer = ready(makeExport("disk"));
    peer.give(optionBytes(nbd.NBD_OPT_EXTENDED_HEADERS));
    peer.give(optionBytes(nbd.NBD_OPT_SET_META_CONTEXT, metaData("disk", ["base:allocation"])));
    peer.give(optionBytes(nbd.NBD_OPT_GO, goData("disk")));
    expect([form(peer), chosenContexts(peer)]).toEqual(["extended", ["base:allocation"]]);
  });

  test("with data are refused; EXPORT_NAME after them ends the connection", () => {
    const peer = ready(makeExport("disk"));
    peer.give(optionBytes(nbd.NBD_OPT_EXTENDED_HEADERS, Buffer.from("x")));
    peer.give(optionBytes(nbd.NBD_OPT_EXTENDED_HEADERS));
    peer.give(optionBytes(nbd.NBD_OPT_EXPORT_NAME, Buffer.from("disk")));
    expect(peer.types()).toEqual([nbd.NBD_REP_ERR_INVALID, nbd.NBD_REP_ACK]);
    expect(peer.handshake.outcome?.kind).toBe("drop");
  });

  test("BLOCK_STATUS_PAYLOAD is offered only with contexts of the same export; INFO and GO agree", () => {
    for (const [name, isOffered] of [
      ["disk", true],
      ["other", false],
    ] as const) {
      const peer = ready(makeExport("disk"), makeExport("other"));
      peer.give(optionBytes(nbd.NBD_OPT_EXTENDED_HEADERS));
      peer.give(optionBytes(nbd.NBD_OPT_SET_META_CONTEXT, metaData(name, ["base:allocation"])));
      peer.sent.length = 0;
      peer.give(optionBytes(nbd.NBD_OPT_INFO, goData("disk")), optionBytes(nbd.NBD_OPT_GO, goData("disk")));
      const infos = peer.replies().filter(({ type }) => type === nbd.NBD_REP_INFO);
      const offers = infos.map(
        ({ data }) => (data.readUInt16BE(10) & nbd.NBD_FLAG_BLOCK_STATUS_PAYLOAD) !== 0,
      );
      expect(offers).toEqual([isOffered, isOffered]);
    }
  });
});

describe("TLS required", () => {
  const demanding = (flags = CLIENT_FLAGS): Peer => {
    const peer = new Peer([makeExport("disk")], true);
    peer.give(flags);
    return peer;
  };

  test.each([
    ["LIST", nbd.NBD_OPT_LIST],
    ["INFO", nbd.NBD_OPT_INFO],
    ["GO", nbd.NBD_OPT_GO],
    ["STRUCTURED_REPLY", nbd.NBD_OPT_STRUCTURED_REPLY],
    ["EXTENDED_HEADERS", nbd.NBD_OPT_EXTENDED_HEADERS],
    ["SET_META_CONTEXT", nbd.NBD_OPT_SET_META_CONTEXT],
    ["an unknown option", 4711],
  ])("%s is answered with TLS_REQD and nothing else", (_name, option) => {
    const peer = demanding();
    peer.give(optionBytes(option, goData("disk")));
    expect(peer.types()).toEqual([nbd.NBD_REP_ERR_TLS_REQD]);
    expect(peer.handshake.outcome).toBeUndefined();
  });

  test("EXPORT_NAME ends the connection without a word about the export", () => {
    const peer = demanding();
    peer.give(optionBytes(nbd.NBD_OPT_EXPORT_NAME, Buffer.from("disk")));
    expect(peer.sent).toEqual([]);
    expect(peer.handshake.outcome?.kind).toBe("drop");
  });

  test("ABORT is acknowledged", () => {
    const peer = demanding();
    peer.give(optionBytes(nbd.NBD_OPT_ABORT));
    expect(peer.types()).toEqual([nbd.NBD_REP_ACK]);
    expect(peer.handshake.outcome).toEqual({ kind: "end" });
  });

  test("a client without fixed newstyle is hung up on", () => {
    expect(demanding(Buffer.from([0, 0, 0, 2])).handshake.outcome?.kind).toBe("drop");
  });

  test("STARTTLS with data is refused, without it acknowledged; what follows is not looked at", () => {
    const peer = demanding();
    peer.give(optionBytes(nbd.NBD_OPT_STARTTLS, Buffer.from("x")));
    const start = optionBytes(nbd.NBD_OPT_STARTTLS);
    expect(peer.give(start, optionBytes(nbd.NBD_OPT_GO, goData("disk")))).toBe(start.length);
    expect(peer.types()).toEqual([nbd.NBD_REP_ERR_INVALID, nbd.NBD_REP_ACK]);
    expect(peer.handshake.outcome).toEqual({ kind: "startTls" });
  });

  test("after it everything is as at the start, and a second STARTTLS is refused", () => {
    const peer = demanding();
    peer.give(optionBytes(nbd.NBD_OPT_STARTTLS));
    peer.handshake.secured();
    peer.sent.length = 0;
    peer.give(optionBytes(nbd.NBD_OPT_STARTTLS), optionBytes(nbd.NBD_OPT_GO, goData("disk")));
    expect(peer.types()).toEqual([nbd.NBD_REP_ERR_INVALID, nbd.NBD_REP_INFO, nbd.NBD_REP_ACK]);
    expect(peer.handshake.outcome).toMatchObject({ negotiated: { replyForm: "simple", contexts: [] } });
  });
});

describe("what is refused", () => {
  test.each([
    ["STARTTLS", nbd.NBD_OPT_STARTTLS, Buffer.alloc(0), nbd.NBD_REP_ERR_POLICY],
    ["a name with NUL", nbd.NBD_OPT_GO, goData("di\0k"), nbd.NBD_REP_ERR_INVALID],
    ["an unknown option", 4711, Buffer.from("data"), nbd.NBD_REP_ERR_UNSUP],
    ["STRUCTURED_REPLY with data", nbd.NBD_OPT_STRUCTURED_REPLY, Buffer.from("x"), nbd.NBD_REP_ERR_INVALID],
    ["GO without data", nbd.NBD_OPT_GO, Buffer.alloc(0), nbd.NBD_REP_ERR_INVALID],
    ["GO with too long a name", nbd.NBD_OPT_GO, Buffer.from("ffffffff0000", "hex"), nbd.NBD_REP_ERR_INVALID],
    [
      "GO with data left over",
      nbd.NBD_OPT_GO,
      Buffer.concat([goData("disk"), Buffer.alloc(1)]),
      nbd.NBD_REP_ERR_INVALID,
    ],
    [
      "GO with too few requests",
      nbd.NBD_OPT_GO,
      goData("disk", [1, 2]).subarray(0, -2),
      nbd.NBD_REP_ERR_INVALID,
    ],
    ["a name of 4097 bytes", nbd.NBD_OPT_GO, goData("x".repeat(4097)), nbd.NBD_REP_ERR_INVALID],
    [
      "more queries than there are bytes",
      nbd.NBD_OPT_LIST_META_CONTEXT,
      Buffer.concat([stringBytes("disk"), Buffer.from("ffffffff", "hex")]),
      nbd.NBD_REP_ERR_INVALID,
    ],
  ])("%s, and the next option is understood", (_what, option, data, error) => {
    const peer = ready(makeExport("disk"));
    peer.give(optionBytes(nbd.NBD_OPT_STRUCTURED_REPLY));
    peer.sent.length = 0;
    peer.give(optionBytes(option, data), optionBytes(nbd.NBD_OPT_GO, goData("disk")));
    expect(peer.types()).toEqual([error, nbd.NBD_REP_INFO, nbd.NBD_REP_ACK]);
  });

  test("an option beyond the limit: an error, then the end, before its data comes", () => {
    const peer = ready(makeExport("disk"));
    peer.give(optionBytes(nbd.NBD_OPT_GO, Buffer.alloc(nbd.MAX_OPTION_BYTES + 1)).subarray(0, 16));
    expect(peer.types()).toEqual([nbd.NBD_REP_ERR_TOO_BIG]);
    expect(peer.handshake.outcome?.kind).toBe("drop");
  });

  test("a wrong magic ends it", () => {
    const peer = ready(makeExport("disk"));
    peer.give(Buffer.alloc(16));
    expect(peer.handshake.outcome?.kind).toBe("drop");
  });

  test("options without end", () => {
    const peer = ready(makeExport("disk"));
    const list = optionBytes(nbd.NBD_OPT_STRUCTURED_REPLY);
    for (let i = 0; i < 5000; i++) peer.give(list);
    expect(peer.handshake.outcome).toMatchObject({ kind: "drop", reason: "more than 4096 options" });
  });

  test("ABORT is acknowledged; during a shutdown everything else is refused", () => {
    const peer = ready(makeExport("disk"));
    peer.handshake.shuttingDown = true;
    peer.give(optionBytes(nbd.NBD_OPT_GO, goData("disk")), optionBytes(nbd.NBD_OPT_ABORT));
    expect(peer.types()).toEqual([nbd.NBD_REP_ERR_SHUTDOWN, nbd.NBD_REP_ACK]);
    expect(peer.handshake.outcome).toEqual({ kind: "end" });
  });
});
