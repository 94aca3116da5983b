// The NBD server against byte streams that no honest client sends.
//
// Each case takes a valid conversation (negotiation and requests, compact or extended), spoils it or not, and sends
// it in pieces to a server on a Unix socket, beside a canary: an honest client that must find its data at every turn.
//
//   intact      nothing is spoiled: every request is answered once, by the right cookie, in the agreed form
//   cut         the client hangs up after some byte
//   mutated     bits, lengths, whole fields, repeated, left out, swapped or foreign messages
//   mute        the client sends and never reads
//
// What must hold: no exception reaches the process; no device is asked for a range that it does not have; the canary
// is served; every case's connection comes to its end, and with it all its buffers come back; descriptors do not
// grow. A case is a function of seed and number, so a finding can be shown again.

import { mkdtempSync, readdirSync, rmSync } from "node:fs";
import { connect, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Completion } from "../../src/block/device.js";
import { listenUnix } from "../../src/nbd/server/listen.js";
import { NbdServer, type NbdLogger } from "../../src/nbd/server/server.js";
import { MemoryDevice, RawClient, goData, optionBytes, requestBytes } from "../support/nbd-peer.js";
import { Random } from "../support/random.js";
import * as nbd from "../../src/nbd/wire/protocol.js";
import { type Conversation, checkReplies, makeConversation, mutate } from "./nbd-conversation.js";

export interface NbdFuzzOptions {
  seed: number;
  /** Whichever comes first; without both, 200 cases. */
  seconds?: number | undefined;
  iterations?: number | undefined;
  /** This case alone. */
  firstCase?: number | undefined;
}

export interface NbdFuzzSummary {
  name: string;
  cases: number;
  findings: string[];
  notes: string[];
}

const DISK_BYTES = 1024 * 1024;
const CANARY_BYTES = 4096;
const DEFAULT_ITERATIONS = 200;
const MAX_FINDINGS = 10;
const CASE_TIMEOUT_MS = 60_000;
/** Cases between two counts of descriptors. */
const COUNT_EVERY = 50;

function touchesCanary(offsetBytes: number, lengthBytes: number): boolean {
  const end = offsetBytes + lengthBytes;
  return end > DISK_BYTES - CANARY_BYTES && end <= DISK_BYTES;
}

/** Notes every call that the server must not make. */
class WatchedDevice extends MemoryDevice {
  readonly violations: string[] = [];

  override read(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Completion {
    return this.watch(() => super.read(buffer, bufferOffset, lengthBytes, offsetBytes));
  }

  override write(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Completion {
    // The last block is the canary's.
    if (!this.isCanaryTurn && touchesCanary(offsetBytes, lengthBytes)) return undefined;
    return this.watch(() => super.write(buffer, bufferOffset, lengthBytes, offsetBytes));
  }

  override writeZeroes(offsetBytes: number, lengthBytes: number, options: { mayUnmap: boolean }): Completion {
    if (touchesCanary(offsetBytes, lengthBytes)) return undefined;
    return this.watch(() => super.writeZeroes(offsetBytes, lengthBytes, options));
  }

  override discard(offsetBytes: number, lengthBytes: number): Completion {
    return this.watch(() => super.discard(offsetBytes, lengthBytes));
  }

  isCanaryTurn = false;

  private watch(call: () => Completion): Completion {
    try {
      return call();
    } catch (error) {
      this.violations.push(String(error));
      throw error;
    }
  }
}

class Bench {
  readonly device = new WatchedDevice(DISK_BYTES);
  readonly folder = mkdtempSync(join(tmpdir(), "cowcatcher-fuzz-"));
  readonly path = join(this.folder, "nbd.sock");
  readonly server: NbdServer;
  readonly escaped: string[] = [];
  private canary: RawClient | undefined;
  private readonly escape = (error: unknown): void => {
    this.escaped.push(error instanceof Error ? (error.stack ?? error.message) : String(error));
  };
  private close: () => Promise<void> = () => Promise.resolve();

  constructor() {
    const ignore = (): void => undefined;
    const logger: NbdLogger = { debug: ignore, info: ignore, warn: ignore, error: ignore };
    const disk = {
      name: "disk",
      description: "fuzzed",
      device: this.device,
      readOnly: false,
      canMultiConn: true,
    };
    const stripes = {
      name: "qemu:dirty-bitmap:stripes",
      status: (_offset: number, lengthBytes: number) => ({
        lengthBytes: Math.min(lengthBytes, 512),
        flags: 1,
      }),
    };
    const exports = [
      { ...disk, contexts: [stripes] },
      { ...disk, name: "fixed", readOnly: true },
    ];
    this.server = new NbdServer({
      exports: new Map(exports.map((nbdExport) => [nbdExport.name, nbdExport])),
      maxConnections: 64,
      logger,
    });
  }

  async start(): Promise<void> {
    process.on("uncaughtException", this.escape);
    process.on("unhandledRejection", this.escape);
    const listener = await listenUnix(this.path);
    listener.serve(this.server);
    this.close = () => listener.close();
    const canary = new RawClient(this.path);
    await canary.read(18);
    canary.send(Buffer.from([0, 0, 0, 3]), optionBytes(nbd.NBD_OPT_GO, goData("disk")));
    await canary.read(20 + 12 + 20);
    this.canary = canary;
  }

  async stop(): Promise<void> {
    this.canary?.destroy();
    await this.close();
    await this.server.close();
    process.off("uncaughtException", this.escape);
    process.off("unhandledRejection", this.escape);
    rmSync(this.folder, { recursive: true, force: true });
  }

  /** The canary writes and reads its block; undefined if all is well. */
  async sing(note: number): Promise<string | undefined> {
    const { canary } = this;
    if (canary === undefined) return "there is no canary";
    const song = Buffer.alloc(CANARY_BYTES, note);
    const offset = DISK_BYTES - CANARY_BYTES;
    this.device.isCanaryTurn = true;
    canary.send(requestBytes(nbd.NBD_CMD_WRITE, { cookie: 1n, offset, payload: song }));
    const { error } = await canary.simpleReply();
    this.device.isCanaryTurn = false;
    canary.send(requestBytes(nbd.NBD_CMD_READ, { cookie: 2n, offset, length: CANARY_BYTES }));
    const read = await canary.simpleReply();
    const data = await canary.read(CANARY_BYTES);
    if (error !== 0 || read.error !== 0 || read.cookie !== 2n)
      return "the canary's request was answered wrongly";
    return data.equals(song) ? undefined : "the canary's data changed";
  }

  /** Only the canary's connection and buffers are left. */
  get isQuiet(): boolean {
    return this.server.connectionCount === 1;
  }
}

/** What a case came to: the bytes that the server sent. */
interface Played {
  received: Buffer;
  isMute: boolean;
}

/** @returns what was found, without stopping at the first finding. */
export async function fuzzNbdServer(options: NbdFuzzOptions): Promise<NbdFuzzSummary> {
  const { seed, seconds, firstCase } = options;
  const limit = firstCase !== undefined ? firstCase + 1 : caseLimit(options);
  const deadlineMs = seconds === undefined ? Infinity : performance.now() + seconds * 1000;
  const summary: NbdFuzzSummary = { name: "nbd", cases: 0, findings: [], notes: [] };
  const bench = new Bench();
  await bench.start();
  const idleBytes = bench.server.heldBytes;
  const idleFiles = openFileCount();
  let answered = 0;
  try {
    for (let index = firstCase ?? 0; index < limit && performance.now() < deadlineMs; index++) {
      const outcome = await runCase(bench, seed, index, idleBytes);
      summary.cases++;
      answered += outcome.answered;
      if (outcome.problem !== undefined) {
        summary.findings.push(
          `nbd: ${outcome.problem}\n  npm run fuzz -- --only nbd --seed ${seed} --case ${index}`,
        );
        if (summary.findings.length >= MAX_FINDINGS) break;
      }
      if (index % COUNT_EVERY === COUNT_EVERY - 1 && openFileCount() > idleFiles + 2) {
        summary.findings.push(`nbd: ${openFileCount()} descriptors are open, ${idleFiles} at the start`);
        break;
      }
    }
  } finally {
    await bench.stop();
  }
  summary.notes.push(`${answered} requests of intact conversations were answered rightly`);
  return summary;
}

function caseLimit({ seconds, iterations }: NbdFuzzOptions): number {
  return iterations ?? (seconds === undefined ? DEFAULT_ITERATIONS : Infinity);
}

async function runCase(
  bench: Bench,
  seed: number,
  index: number,
  idleBytes: number,
): Promise<{ problem: string | undefined; answered: number }> {
  const random = new Random(seed * 1_000_003 + index);
  bench.device.mode = random.chance(0.5) ? "now" : "later";
  const conversation = makeConversation(random, DISK_BYTES - CANARY_BYTES, DISK_BYTES);
  const kind = random.pick(["intact", "cut", "mutated", "mutated", "mutated", "mute"] as const);
  const whole = Buffer.concat(
    kind === "mutated" ? mutate(conversation.messages, random) : conversation.messages,
  );
  const bytes = kind === "cut" ? whole.subarray(0, index % (whole.length + 1)) : whole;
  const played = await play(bench, bytes, random, kind);
  const problem = await judge(bench, index, idleBytes, kind === "intact" ? conversation : undefined, played);
  const isRight = problem === undefined && kind === "intact";
  return {
    problem: problem && `case ${index} (${kind}): ${problem}`,
    answered: isRight ? conversation.requests.length : 0,
  };
}

async function judge(
  bench: Bench,
  index: number,
  idleBytes: number,
  intact: Conversation | undefined,
  played: Played | undefined,
): Promise<string | undefined> {
  const { device, escaped, server } = bench;
  if (escaped.length > 0) return `an exception escaped: ${escaped.splice(0).join("; ")}`;
  if (device.violations.length > 0)
    return `the device was asked wrongly: ${device.violations.splice(0).join("; ")}`;
  if (played === undefined) return "the connection did not come to its end";
  const songProblem = await within(bench.sing(index % 251), "the canary was not served");
  if (songProblem !== undefined) return songProblem;
  if (server.heldBytes > idleBytes + 1024 * 1024) return `${server.heldBytes} bytes of buffers are out`;
  return intact === undefined ? undefined : checkReplies(intact, played.received);
}

/** Sends the bytes in pieces, ends or breaks off, and waits until the server is done with the connection. */
async function play(bench: Bench, bytes: Buffer, random: Random, kind: string): Promise<Played | undefined> {
  const socket = connect({ path: bench.path, allowHalfOpen: true });
  const received: Buffer[] = [];
  const isMute = kind === "mute";
  let isClosed = false;
  socket.on("error", () => undefined);
  socket.on("close", () => {
    isClosed = true;
  });
  const ended = new Promise<void>((resolve) => {
    socket.on("end", resolve);
    socket.on("close", () => resolve());
  });
  if (!isMute) socket.on("data", (chunk: Buffer) => void received.push(chunk));
  await send(socket, bytes, random, () => isClosed);
  const isBrokenOff = isMute || (kind !== "intact" && random.chance(0.5));
  if (isBrokenOff) socket.destroy();
  else socket.end();
  const timeout = await within(
    ended.then(() => undefined),
    "late",
  );
  socket.destroy();
  const deadline = performance.now() + CASE_TIMEOUT_MS;
  while (!bench.isQuiet && performance.now() < deadline) await turn();
  return timeout !== undefined || !bench.isQuiet ? undefined : { received: Buffer.concat(received), isMute };
}

async function send(socket: Socket, bytes: Buffer, random: Random, isClosed: () => boolean): Promise<void> {
  const pieceBytes = random.pick([1, 7, 64, 1500, 65_536, Infinity]);
  // Thousands of single bytes would only be slow.
  const limit = Math.max(pieceBytes, bytes.length / 200);
  for (let at = 0; at < bytes.length && !isClosed();) {
    const count = Math.min(bytes.length - at, Math.ceil(limit));
    socket.write(bytes.subarray(at, at + count));
    at += count;
    await turn();
  }
}

async function within(work: Promise<string | undefined>, late: string): Promise<string | undefined> {
  let timer: NodeJS.Timeout | undefined;
  const timeout = new Promise<string>((resolve) => {
    timer = setTimeout(resolve, CASE_TIMEOUT_MS, late);
  });
  try {
    return await Promise.race([work, timeout]);
  } catch (error) {
    return String(error);
  } finally {
    clearTimeout(timer);
  }
}

function turn(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve));
}

function openFileCount(): number {
  return readdirSync("/proc/self/fd").length;
}
