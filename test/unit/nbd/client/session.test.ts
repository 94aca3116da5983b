// What the client repeats after a loss and what it does not, and how it cuts ranges; against a scripted server.
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { CowcatcherError } from "../../../../src/errors.js";
import { NbdClient } from "../../../../src/nbd/client/client.js";
import { readRange, zeroRange } from "../../../../src/nbd/client/io.js";
import { NbdSession, type NbdSessionOptions } from "../../../../src/nbd/client/session.js";
import { NbdImage } from "../../../../src/nbd/client/device.js";
import { ExtentList } from "../../../../src/nbd/server/extents.js";
import {
  NBD_CMD_FLAG_FAST_ZERO,
  NBD_CMD_READ,
  NBD_CMD_TRIM,
  NBD_CMD_WRITE,
  NBD_CMD_WRITE_ZEROES,
  NBD_EINVAL,
  NBD_EOVERFLOW,
  NBD_FLAG_SEND_FAST_ZERO,
} from "../../../../src/nbd/wire/protocol.js";
import { MemoryDevice, until } from "../../../support/nbd-peer.js";
import {
  ALL_FLAGS,
  ScriptedServer,
  type ScriptOptions,
  type ScriptRequest,
  type Verdict,
} from "../../../support/nbd-script.js";

const KiB = 1024;
const MiB = 1024 * KiB;
const SIZE = 1 * MiB;

const cleanups: (() => unknown)[] = [];
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
});

async function startScript(options: Partial<ScriptOptions> = {}): Promise<ScriptedServer> {
  const server = await ScriptedServer.start({ data: Buffer.alloc(SIZE, 7), ...options });
  cleanups.push(() => server.stop());
  return server;
}

function sessionWith(server: ScriptedServer, options: Partial<NbdSessionOptions> = {}): NbdSession {
  const session = new NbdSession({ uri: server.uri, retries: 3, ...options });
  cleanups.push(() => session.destroy());
  return session;
}

async function imageOn(server: ScriptedServer, options: Partial<NbdSessionOptions> = {}): Promise<NbdImage> {
  const session = sessionWith(server, options);
  return new NbdImage(session, await session.client(), { readOnly: false });
}

async function clientOf(server: ScriptedServer): Promise<NbdClient> {
  const client = await NbdClient.connect(server.uri);
  cleanups.push(() => client.destroy());
  return client;
}

async function failureOf(work: unknown): Promise<CowcatcherError> {
  const error: unknown = await Promise.resolve(work).then(
    () => undefined,
    (reason: unknown) => reason,
  );
  expect(error).toBeInstanceOf(CowcatcherError);
  return error as CowcatcherError;
}

it.each([true, false])(
  "a connection that is to stay open (%s) outlives the cancel of what is in flight",
  async (staysOpen) => {
    const server = await startScript({ onRequest: () => "silence" });
    let isCancelled = false;
    const session = sessionWith(server, { isCancelled: () => isCancelled, staysOpen });
    const reading = session.run((client) => client.read(new Uint8Array(KiB), 0, KiB, 0));
    await until(() => server.count(NBD_CMD_READ) === 1);
    isCancelled = true;
    expect(await failureOf(reading)).toMatchObject({ code: "CANCELLED" });
    // By the time that another client has come, the server has noticed who has hung up.
    const other = await clientOf(server);
    expect(server.sockets.size).toBe(staysOpen ? 2 : 1);
    session.destroy();
    other.destroy();
    await until(() => server.sockets.size === 0);
  },
);

it("who is to stay open sees its negotiation to the end, whatever is cancelled", async () => {
  const server = await startScript();
  const held: (() => void)[] = [];
  server.options.send = (messages, { phase }, socket) => {
    const send = (): void => void socket.write(Buffer.concat(messages));
    if (phase === "option") held.push(send);
    else send();
  };
  let asked = 0;
  const isCancelled = (): boolean => asked++ >= 0;
  const connecting = NbdClient.connect(server.uri, { isCancelled, staysOpen: true });
  const letGo = setInterval(() => held.splice(0).forEach((send) => send()), 150);
  const client = await connecting;
  clearInterval(letGo);
  expect(client.sizeBytes).toBe(SIZE);
  client.destroy();
  const given = NbdClient.connect(server.uri, { isCancelled });
  expect(await failureOf(given)).toMatchObject({ code: "CANCELLED" });
  expect(asked).toBeGreaterThan(0);
});

/** The first request of this kind meets `verdict`, all others are answered. */
function once(command: number, verdict: "silence" | "hang up") {
  let isOver = false;
  return (request: ScriptRequest) => {
    if (isOver || request.command !== command) return "answer";
    isOver = true;
    return verdict;
  };
}

const CHANGES: [string, number, (image: NbdImage) => unknown][] = [
  ["write", NBD_CMD_WRITE, (image) => image.write(Buffer.alloc(4096, 1), 0, 4096, 0)],
  ["write of zeroes", NBD_CMD_WRITE_ZEROES, (image) => image.writeZeroes(0, 4096, { mayUnmap: true })],
  ["trim", NBD_CMD_TRIM, (image) => image.discard(0, 4096)],
];

const REPLY_TIMEOUT_MS = 20_000;
/** Longer than that, and shorter than the time for which a lost connection is made again. */
const SILENCE_MS = 30_000;

describe("after a loss", () => {
  // The clock by which the client tells silence goes on in small steps, or when told to: the machine's pauses do not
  // pass for a silence.
  beforeEach(() => {
    vi.useFakeTimers({ toFake: ["setInterval", "clearInterval", "performance"], shouldAdvanceTime: true });
  });
  afterEach(() => void vi.useRealTimers());

  it.each(CHANGES)("a %s is not done again when the server fell silent", async (_name, command, change) => {
    const server = await startScript({ onRequest: once(command, "silence") });
    const image = await imageOn(server, { replyTimeoutMs: REPLY_TIMEOUT_MS });
    const failure = failureOf(change(image));
    await until(() => server.count(command) === 1);
    vi.advanceTimersByTime(SILENCE_MS);
    expect(await failure).toMatchObject({ code: "IO", errno: "ETIMEDOUT" });
    expect(server.count(command)).toBe(1);
    expect(server.connectionCount).toBe(1);
    // What follows goes through on a connection of its own.
    await change(image);
    expect(server.count(command)).toBe(2);
    expect(server.connectionCount).toBe(2);
  });

  it.each(CHANGES)("a %s is done again when the server hung up", async (_name, command, change) => {
    const server = await startScript({ onRequest: once(command, "hang up") });
    const image = await imageOn(server, { replyTimeoutMs: REPLY_TIMEOUT_MS });
    await change(image);
    expect(server.count(command)).toBe(2);
  });

  it("a read is done again in either case", async () => {
    for (const verdict of ["silence", "hang up"] as const) {
      const server = await startScript({ onRequest: once(NBD_CMD_READ, verdict) });
      const image = await imageOn(server, { replyTimeoutMs: REPLY_TIMEOUT_MS });
      const buffer = Buffer.alloc(4096);
      const reading = image.read(buffer, 0, 4096, 0);
      await until(() => server.count(NBD_CMD_READ) > 0);
      if (verdict === "silence") vi.advanceTimersByTime(SILENCE_MS);
      await reading;
      expect(buffer.every((byte) => byte === 7)).toBe(true);
      expect(server.count(NBD_CMD_READ)).toBe(2);
    }
  });

  it("blocks may have become smaller, and not larger", async () => {
    const server = await startScript({ blockSizes: [512, 4096, 32 * MiB] });
    const session = sessionWith(server);
    const read = () => session.run((client) => client.read(Buffer.alloc(4096), 0, 4096, 0));
    await read();
    const again = async (minimum: number) => {
      server.options.blockSizes = [minimum, 4096, 32 * MiB];
      server.hangUp();
      await read();
    };
    await again(1);
    expect(await failureOf(again(4096))).toMatchObject({
      code: "PROTOCOL",
      problem: "connected again, the export has blocks of 4096 bytes instead of 1",
    });
  });

  it("a writable export must still be so", async () => {
    const server = await startScript();
    const image = await imageOn(server);
    server.options.flags = ALL_FLAGS | 2;
    server.hangUp();
    expect((await failureOf(image.read(Buffer.alloc(512), 0, 512, 0))).code).toBe("PROTOCOL");
  });
});

describe("a range", () => {
  it("of more pieces than a client lets wait goes through, a few at a time", async () => {
    let [open, mostOpen] = [0, 0];
    const server = await startScript({
      data: Buffer.alloc(4 * MiB, 9),
      blockSizes: [1, 512, 512],
      onRequest: async (): Promise<Verdict> => {
        mostOpen = Math.max(mostOpen, ++open);
        await new Promise((resolve) => setImmediate(resolve));
        open--;
        return "answer";
      },
    });
    const client = await clientOf(server);
    const buffer = Buffer.alloc(4 * MiB);
    await readRange(client, buffer, 0, buffer.length, 0);
    expect(buffer.every((byte) => byte === 9)).toBe(true);
    expect(server.count(NBD_CMD_READ)).toBe(8192);
    expect(mostOpen).toBeGreaterThan(1);
    expect(mostOpen).toBeLessThanOrEqual(16);
  });

  it("that fails asks for nothing more", async () => {
    const server = await startScript({
      blockSizes: [1, 512, 512],
      onRequest: ({ offset }) => (offset === 1024 ? NBD_EINVAL : "answer"),
    });
    const client = await clientOf(server);
    const error = await failureOf(readRange(client, Buffer.alloc(SIZE), 0, SIZE, 0));
    expect(error).toMatchObject({ code: "IO", offsetBytes: 1024 });
    expect(server.requests.length).toBeLessThan(64);
    expect(client.inFlight).toBe(0);
  });

  it.each([
    ["EOVERFLOW", NBD_EOVERFLOW],
    ["EINVAL", NBD_EINVAL],
  ])("of zeroes that is refused as too long (%s) is cut to the most data", async (_name, error) => {
    const most = 64 * KiB;
    const data = Buffer.alloc(SIZE, 7);
    const server = await startScript({
      data,
      flags: ALL_FLAGS | NBD_FLAG_SEND_FAST_ZERO,
      blockSizes: [1, 4096, most],
      onRequest: ({ command, length }) =>
        command === NBD_CMD_WRITE_ZEROES && length > most ? error : "answer",
    });
    const policy = { mayUnmap: true, fast: true };
    await zeroRange(await clientOf(server), 100, SIZE - 200, policy);
    expect(data.subarray(100, SIZE - 100).every((byte) => byte === 0)).toBe(true);
    expect([data[99], data[SIZE - 100]]).toEqual([7, 7]);
    expect(server.count(NBD_CMD_WRITE)).toBe(0);
    // Too long is not too slow.
    expect(policy.fast).toBe(true);
    expect(server.requests[0]?.flags).toBe(NBD_CMD_FLAG_FAST_ZERO);
  });

  it("of zeroes that is refused though it is short is the caller's error", async () => {
    const server = await startScript({ onRequest: () => NBD_EINVAL });
    const policy = { mayUnmap: true, fast: true };
    const work = zeroRange(await clientOf(server), 0, 4096, policy);
    expect(await failureOf(work)).toMatchObject({ errno: "EINVAL" });
  });
});

describe("a server's block status", () => {
  it("ends early where the device is slow, and says at least something", () => {
    let queries = 0;
    class SlowDevice extends MemoryDevice {
      override blockStatus(offsetBytes: number, lengthBytes: number) {
        queries++;
        for (const end = performance.now() + 0.2; performance.now() < end;);
        return super.blockStatus(offsetBytes, Math.min(lengthBytes, 1));
      }
    }
    const bounds = { maxExtents: 4096, maxQueries: 4096 };
    const list = new ExtentList(new SlowDevice(SIZE), 0, SIZE, bounds);
    expect(list.gather()).toBeUndefined();
    expect(list.coveredBytes).toBe(queries);
    expect(queries).toBeGreaterThan(0);
    expect(queries).toBeLessThan(200);
  });
});
