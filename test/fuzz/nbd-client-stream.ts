// The NBD client against servers that no client should trust.
//
// Each case is one session with a server in this process (test/support/nbd-script.ts), which speaks a right
// conversation and then, or not at all, a wrong one; beside it requests of every kind, several at a time.
//
//   intact   nothing is spoilt: every request succeeds, reads give the disk, writes carry what they should
//   strange  a right conversation about an odd export: sizes and block sizes at the edges, no contexts, errors
//   spoilt   from some message on some messages are spoilt or forged (nbd-client-lies.ts)
//   poisoned from some message on one lie that no client may pass over, and the client must hang up for it
//   cut      the server's bytes end after any count of them: hung up on, half closed, or silence
//
// What must hold: every request settles in time, and with a typed error of one line if it fails; a read that succeeds
// has data in every byte that was asked for, touches no other, and, as long as the server has told no lie, has the
// disk's; no exception escapes; connections, descriptors and memory come back. Requests only ever write what the disk
// holds, so its content is the same at every moment. A case is a function of seed and number.

import { readdirSync } from "node:fs";
import type { Socket } from "node:net";
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import { CowcatcherError } from "../../src/errors.js";
import { NbdSession } from "../../src/nbd/client/session.js";
import * as nbd from "../../src/nbd/wire/protocol.js";
import {
  ALL_FLAGS,
  dataChunk,
  holeChunk,
  type MessageKind,
  ScriptedServer,
  type ScriptOptions,
  type ScriptRequest,
  statusChunk,
} from "../support/nbd-script.js";
import { Random } from "../support/random.js";
import { EDGES_32, poison, spoil } from "./nbd-client-lies.js";
import {
  DISK,
  DISK_BYTES,
  makeOperation,
  type Operation,
  ZERO_FROM,
  ZERO_TO,
} from "./nbd-client-operations.js";
import type { NbdFuzzOptions, NbdFuzzSummary } from "./nbd-stream.js";

const KiB = 1024;
const DEFAULT_ITERATIONS = 300;
const MAX_FINDINGS = 10;
/** Nothing in a case waits longer than a few seconds; a machine that is busy may take its time. */
const WATCHDOG_MS = 90_000;
const PATIENT_MS = 75_000;
const HASTY_MS = 120;
/** Cases at a time: most of them wait for a time limit. */
const BATCH = 6;
const BATCHES_PER_COUNT = 10;
/** Of what is still held after a collection. */
const MAX_GROWTH_BYTES = 64 * 1024 * KiB;
/** A server that gives a byte at a time would be asked for as long as the client likes. */
const MAX_REQUESTS = 400;
const RELEASE_MS = 30_000;
const MAX_MESSAGE_CHARACTERS = 2000;

type Kind = "intact" | "strange" | "spoilt" | "poisoned" | "cut";

/** What the server of a case does. */
class Scenario {
  readonly kind: Kind;
  readonly options: ScriptOptions;
  readonly random: Random;
  readonly disk = Buffer.from(DISK);
  /** The server has said what is not so, or less than there is. */
  hasLied = false;
  wrong: string | undefined;
  poisoned: Socket | undefined;
  private requestCount = 0;
  private messageCount = 0;
  private readonly spoiltFrom: number;
  private bytesLeft: number;
  private readonly ending: "destroy" | "end" | "silence";

  constructor(seed: number) {
    this.random = new Random(seed);
    const { random } = this;
    this.kind = random.pick<Kind>(["intact", "strange", "spoilt", "spoilt", "spoilt", "poisoned", "cut"]);
    this.spoiltFrom = this.kind === "spoilt" ? random.below(random.pick([4, 20])) : Infinity;
    this.bytesLeft = this.kind === "cut" ? random.below(random.pick([120, 1000, 100_000])) : Infinity;
    this.ending = random.pick(["destroy", "end", "silence"]);
    const structured = random.chance(0.75);
    this.options = {
      data: this.disk,
      structured,
      contexts: random.chance(0.8) ? ["base:allocation"] : [],
      flags: random.pick([ALL_FLAGS, ALL_FLAGS | nbd.NBD_FLAG_SEND_FAST_ZERO, nbd.NBD_FLAG_SEND_FLUSH]),
      blockSizes:
        random.pick<[number, number, number] | null>([
          null,
          [1, 4096, 32 * 1024 * KiB],
          [512, 4096, 65_536],
          [4096, 4096, 4096],
        ]) ?? undefined,
      ...(this.kind === "strange" && this.strangeExport()),
      onRequest: (request) => this.decide(request),
      answer: (request, isStructured) => (isStructured ? this.answer(request) : undefined),
      send: (messages, kind, socket) => this.send(messages, kind, socket),
    };
  }

  private strangeExport(): Partial<ScriptOptions> {
    const { random } = this;
    const sizes = [0n, 1n, 511n, 65_535n, BigInt(DISK_BYTES - 1), 2n ** 53n, 2n ** 63n, 2n ** 64n - 1n];
    const edge = (): number => random.pick([...EDGES_32, 512, 513, 4096, 65_535]);
    return {
      ...(random.chance(0.5) && { sizeBytes: random.pick(sizes) }),
      ...(random.chance(0.5) && { blockSizes: [edge(), edge(), edge()] }),
      flags: random.below(65_536),
    };
  }

  private decide(request: ScriptRequest) {
    const { random, kind } = this;
    if (++this.requestCount > MAX_REQUESTS && kind !== "intact") return "hang up";
    if (request.command === nbd.NBD_CMD_BLOCK_STATUS && !this.options.structured) return nbd.NBD_EINVAL;
    if (kind === "strange" && random.chance(0.1)) {
      return random.pick([1, 5, 12, 22, 28, 75, 95, 108, 0xffff_ffff]);
    }
    if (random.chance(0.5)) return "answer";
    return new Promise<"answer">((resolve) => setImmediate(resolve, "answer"));
  }

  /** True, in pieces of several kinds and in any order. */
  private answer(request: ScriptRequest): Buffer[] | undefined {
    const { offset, length, command } = request;
    if (command === nbd.NBD_CMD_BLOCK_STATUS)
      return [statusChunk(request, 1, this.extents(offset, length), true)];
    if (command !== nbd.NBD_CMD_READ || offset + length > DISK_BYTES) return undefined;
    const pieces: [number, number][] = [];
    for (let at = offset; at < offset + length;) {
      const next = Math.min(
        offset + length,
        at + 1 + this.random.below(this.random.pick([1000, 40_000, length])),
      );
      pieces.push([at, next]);
      at = next;
    }
    if (this.random.chance(0.3)) pieces.reverse();
    return pieces.map(([from, to], i) => {
      const isLast = i === pieces.length - 1;
      const isZero = from >= ZERO_FROM && to <= ZERO_TO && this.random.chance(0.7);
      if (isZero) return holeChunk(request, from, to - from, isLast);
      return dataChunk(request, from, Buffer.from(DISK.subarray(from, to)), isLast);
    });
  }

  private extents(offset: number, length: number): [number, number][] {
    const extents: [number, number][] = [];
    const limit = 1 + this.random.below(8);
    for (let at = offset; at < offset + length && extents.length < limit;) {
      const end = at < ZERO_FROM ? ZERO_FROM : at < ZERO_TO ? ZERO_TO : Math.max(DISK_BYTES, offset + length);
      extents.push([end - at, at >= ZERO_FROM && at < ZERO_TO ? nbd.NBD_STATE_ZERO : 0]);
      at = end;
    }
    return extents;
  }

  private send(messages: Buffer[], kind: MessageKind, socket: Socket): void {
    const leaving = messages.flatMap((message, i) => {
      // In place of a reply's beginning: behind the header of a simple one it would be taken for data.
      if (this.kind === "poisoned" && this.poisoned === undefined && kind.request !== undefined && i === 0) {
        if (this.random.chance(0.7)) return [message];
        this.poisoned = socket;
        this.hasLied = true;
        return poison(kind.request, this.random);
      }
      const isSpoilt = this.messageCount++ >= this.spoiltFrom && this.random.chance(0.3);
      if (!isSpoilt) return [message];
      this.hasLied = true;
      return spoil(kind, message, this.random);
    });
    let bytes = Buffer.concat(leaving);
    const isCut = bytes.length > this.bytesLeft;
    if (isCut) {
      this.hasLied = true;
      bytes = bytes.subarray(0, this.bytesLeft);
    }
    this.bytesLeft -= bytes.length;
    this.write(bytes, socket);
    if (!isCut || socket.writableEnded) return;
    if (this.ending === "destroy") socket.destroySoon();
    if (this.ending === "end") socket.end();
  }

  private write(bytes: Buffer, socket: Socket): void {
    if (socket.writableEnded) return;
    const pieceBytes = bytes.length < 2000 ? this.random.pick([1, 7, Infinity]) : Infinity;
    for (let at = 0; at < bytes.length;) {
      const end = Math.min(bytes.length, at + pieceBytes);
      socket.write(bytes.subarray(at, end));
      at = end;
    }
    // Nobody says here what is wrong with it.
    if (this.hasLied && socket.writableLength > 64 * 1024 * KiB) socket.destroy();
  }

  note(problem: string): void {
    this.wrong ??= problem;
  }
}

/** @returns what was found, without stopping at the first finding. */
export async function fuzzNbdClient(options: NbdFuzzOptions): Promise<NbdFuzzSummary> {
  const { seed, seconds, firstCase } = options;
  const limit = firstCase === undefined ? caseLimit(options) : firstCase + 1;
  const deadlineMs = seconds === undefined ? Infinity : performance.now() + seconds * 1000;
  const summary: NbdFuzzSummary = { name: "nbd-client", cases: 0, findings: [], notes: [] };
  const { findings } = summary;
  const escaped = watchEscapes();
  const servers: ScriptedServer[] = [];
  while (servers.length < BATCH) servers.push(await ScriptedServer.start({ data: DISK }));
  const idle = { files: openFileCount(), bytes: heldBytes() };
  let rightCount = 0;
  let batchCount = 0;
  const report = (index: number, problem: string): void =>
    void findings.push(
      `nbd-client: case ${index}: ${problem}\n  npm run fuzz -- --only nbd-client --seed ${seed} --case ${index}`,
    );
  try {
    for (let first = firstCase ?? 0; first < limit && performance.now() < deadlineMs; first += BATCH) {
      const batch = servers.slice(0, limit - first).map(async (server, i) => {
        const outcome = await runCase(server, new Scenario(seed * 1_000_003 + first + i));
        summary.cases++;
        rightCount += outcome.rightCount;
        for (const problem of outcome.problems) report(first + i, problem);
      });
      await Promise.all(batch);
      for (const text of escaped.take())
        report(first, `here or in the next ones an exception escaped: ${text}`);
      if (++batchCount % BATCHES_PER_COUNT === 0) findings.push(...(await leaks(idle)));
      if (findings.length >= MAX_FINDINGS) break;
    }
  } finally {
    for (const server of servers) await server.stop();
    escaped.stop();
  }
  summary.notes.push(`${rightCount} requests of intact conversations had the right answer`);
  return summary;
}

function caseLimit({ seconds, iterations }: NbdFuzzOptions): number {
  return iterations ?? (seconds === undefined ? DEFAULT_ITERATIONS : Infinity);
}

function watchEscapes(): { take: () => string[]; stop: () => void } {
  const escaped: string[] = [];
  const escape = (error: unknown): void => {
    escaped.push(error instanceof Error ? (error.stack ?? error.message) : String(error));
  };
  const events = ["uncaughtException", "unhandledRejection"] as const;
  for (const event of events) process.on(event, escape);
  return {
    take: () => escaped.splice(0),
    stop: () => {
      for (const event of events) process.off(event, escape);
    },
  };
}

async function runCase(
  server: ScriptedServer,
  scenario: Scenario,
): Promise<{ problems: string[]; rightCount: number }> {
  const { random, kind } = scenario;
  const isIntact = kind === "intact";
  server.options = { flags: ALL_FLAGS, structured: false, contexts: [], ...scenario.options };
  server.requests.length = 0;
  const limitMs = kind === "spoilt" || kind === "cut" ? HASTY_MS : PATIENT_MS;
  const session = new NbdSession({
    uri: server.uri,
    retries: isIntact ? 0 : random.pick([0, 0, 1]),
    contexts: ["base:allocation"],
    structured: random.chance(0.9),
    maxInFlight: random.pick([1, 4, 64]),
    connectTimeoutMs: limitMs,
    replyTimeoutMs: limitMs,
  });
  const operations = Array.from({ length: 1 + random.below(10) }, () => makeOperation(scenario));
  const problems: string[] = [];
  const isSettled = await settle(session, operations, scenario, problems);
  if (!(await hasEnded(scenario.poisoned === undefined ? [] : [scenario.poisoned]))) {
    problems.push("the client goes on with a server that has broken the rules");
  }
  if (isSettled && isIntact) await session.close();
  else session.destroy();
  if (scenario.wrong !== undefined) problems.push(scenario.wrong);
  if (isIntact && !scenario.disk.equals(DISK)) problems.push("a write carried what it should not");
  if (!(await hasEnded(server.sockets))) problems.push("the client's connection is still open");
  server.hangUp();
  const named = problems.map((problem) => `(${kind}) ${problem}`);
  return { problems: named, rightCount: isIntact && problems.length === 0 ? operations.length : 0 };
}

/** Runs all of them together, or one after the other; false: they did not come to an end. */
async function settle(
  session: NbdSession,
  operations: readonly Operation[],
  { kind, random }: Scenario,
  problems: string[],
): Promise<boolean> {
  const runOne = async ({ name, run }: Operation): Promise<void> => {
    try {
      const problem = await session.run(run);
      if (problem !== undefined) problems.push(`${name}: ${problem}`);
    } catch (error) {
      const problem = wrongWith(error, kind);
      if (problem !== undefined) problems.push(`${name}: ${problem}`);
    }
  };
  const oneByOne = async (): Promise<void> => {
    for (const operation of operations) await runOne(operation);
  };
  const all = random.chance(0.7) ? Promise.all(operations.map(runOne)) : oneByOne();
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<"late">((resolve) => (timer = setTimeout(resolve, WATCHDOG_MS, "late")));
  const isLate = (await Promise.race([all, late])) === "late";
  clearTimeout(timer);
  if (isLate) problems.push("requests did not settle");
  return !isLate;
}

/** What an error should not be. */
function wrongWith(error: unknown, kind: Kind): string | undefined {
  if (!(error instanceof CowcatcherError)) {
    return `an untyped error: ${error instanceof Error ? (error.stack ?? error.message) : String(error)}`;
  }
  const { code, message } = error;
  if (code === "INTERNAL") return `an internal error: ${error.stack ?? message}`;
  if (/\p{Cc}/u.test(message)) return `control characters in ${JSON.stringify(message)}`;
  if (message.length > MAX_MESSAGE_CHARACTERS) return `an error of ${message.length} characters`;
  // A single read is refused where it is not aligned to the server's blocks, or longer than they allow.
  const isRefused = code === "LIMIT" || error.errno === "EINVAL";
  return kind === "intact" && !isRefused ? `failed: ${message}` : undefined;
}

async function hasEnded(sockets: Iterable<Socket>): Promise<boolean> {
  for (const endMs = performance.now() + WATCHDOG_MS; performance.now() < endMs;) {
    if ([...sockets].every((socket) => socket.destroyed || socket.readableEnded)) return true;
    await new Promise((resolve) => setImmediate(resolve));
  }
  return false;
}

/** What sockets still have on their way when they are destroyed goes a little later. */
async function leaks(idle: { files: number; bytes: number }): Promise<string[]> {
  let found: string[] = [];
  for (const endMs = performance.now() + RELEASE_MS; performance.now() < endMs;) {
    const [files, bytes] = [openFileCount(), heldBytes()];
    found = [
      ...(files > idle.files + 2 ? [`${files} descriptors are open, ${idle.files} at the start`] : []),
      ...(bytes > idle.bytes + MAX_GROWTH_BYTES
        ? [`${bytes} bytes are held, ${idle.bytes} at the start`]
        : []),
    ].map((text) => `nbd-client: ${text}`);
    if (found.length === 0) break;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  return found;
}

function heldBytes(): number {
  setFlagsFromString("--expose-gc");
  const collect = runInNewContext("gc") as () => void;
  collect();
  const { heapUsed, external } = process.memoryUsage();
  return heapUsed + external;
}

function openFileCount(): number {
  return readdirSync("/proc/self/fd").length;
}
