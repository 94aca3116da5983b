// An export that goes while the server runs: its clients are sent away, the others stay.
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { CLOSE_DRAIN_MS } from "../../../../src/nbd/server/limits.js";
import { listenUnix, type NbdListener } from "../../../../src/nbd/server/listen.js";
import * as nbd from "../../../../src/nbd/wire/protocol.js";
import { type NbdExport, NbdServer } from "../../../../src/nbd/server/server.js";
import { goData, MemoryDevice, RawClient, requestBytes, until } from "../../../support/nbd-peer.js";

const MiB = 1024 * 1024;
const COOKIE = 7n;
let folder: string;
let exports: Map<string, NbdExport>;
let server: NbdServer;
let listener: NbdListener;
const clients: RawClient[] = [];

function add(name: string, fields: Partial<NbdExport> = {}): NbdExport {
  const device = new MemoryDevice(4 * MiB);
  const nbdExport = { name, description: "", device, readOnly: true, canMultiConn: true, ...fields };
  exports.set(name, nbdExport);
  return nbdExport;
}

async function client(name: string): Promise<{ peer: RawClient; isIn: boolean }> {
  const peer = new RawClient(join(folder, "nbd.sock"));
  clients.push(peer);
  await peer.read(18);
  peer.send(Buffer.from([0, 0, 0, 3]));
  const replies = await peer.option(nbd.NBD_OPT_GO, goData(name));
  return { peer, isIn: replies.at(-1)?.type === nbd.NBD_REP_ACK };
}

beforeEach(async () => {
  folder = mkdtempSync(join(tmpdir(), "cowcatcher-nbd-"));
  exports = new Map();
  const ignore = (): void => undefined;
  const logger = { debug: ignore, info: ignore, warn: ignore, error: ignore };
  server = new NbdServer({ exports, maxConnections: 16, logger });
  listener = await listenUnix(join(folder, "nbd.sock"));
  listener.serve(server);
});

afterEach(async () => {
  vi.useRealTimers();
  for (const peer of clients.splice(0)) peer.destroy();
  await listener.close();
  await server.close();
  rmSync(folder, { recursive: true, force: true });
});

const READ = requestBytes(nbd.NBD_CMD_READ, { cookie: COOKIE, length: 512 });

test("its clients are hung up on, those of others are served on, and nobody finds it any more", async () => {
  add("disk");
  const snapshot = add("disk-snapshot", { isTemporary: true });
  const { peer: guest } = await client("disk");
  const { peer: reader } = await client("disk-snapshot");
  exports.delete("disk-snapshot");
  void server.endExport(snapshot);
  await until(() => server.connectionCount === 1);
  guest.send(READ);
  expect(await guest.simpleReply()).toEqual({ error: 0, cookie: COOKIE });
  expect((await client("disk-snapshot")).isIn).toBe(false);
  reader.destroy();
});

test("what its device still works on is answered first, and what comes then is refused", async () => {
  const snapshot = add("disk-snapshot", { isTemporary: true });
  const device = snapshot.device as MemoryDevice;
  device.mode = "later";
  device.autoRelease = false;
  const { peer } = await client("disk-snapshot");
  peer.send(READ);
  await until(() => device.calls.length === 1);
  void server.endExport(snapshot);
  peer.send(requestBytes(nbd.NBD_CMD_READ, { cookie: 8n, length: 512 }));
  expect(await peer.simpleReply()).toEqual({ error: nbd.NBD_ESHUTDOWN, cookie: 8n });
  device.releaseAll();
  expect(await peer.simpleReply()).toEqual({ error: 0, cookie: COOKIE });
  await until(() => server.connectionCount === 0);
});

test("a client that takes no answers is cut off after a while", async () => {
  vi.useFakeTimers({ toFake: ["setTimeout", "clearTimeout"] });
  const snapshot = add("disk-snapshot", { isTemporary: true });
  const { peer } = await client("disk-snapshot");
  peer.socket.pause();
  for (let i = 0; i < 16; i++) peer.send(requestBytes(nbd.NBD_CMD_READ, { length: 2 * MiB }));
  await vi.waitUntil(() => server.heldBytes > MiB);
  void server.endExport(snapshot);
  vi.advanceTimersByTime(CLOSE_DRAIN_MS - 1);
  expect(server.connectionCount).toBe(1);
  vi.advanceTimersByTime(1);
  vi.useRealTimers();
  await until(() => server.connectionCount === 0);
});

test("a temporary export is never the default one", async () => {
  add("disk");
  add("disk-snapshot", { isTemporary: true });
  expect((await client("")).isIn).toBe(true);
  exports.delete("disk");
  expect((await client("")).isIn).toBe(false);
});
