import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { libc } from "../../../src/native/libc.js";
import { BlockingReader } from "../../../src/nbd/client/blocking-reader.js";

const SERVER = fileURLToPath(new URL("../../support/nbd-lying-server.py", import.meta.url));
const DISK_BYTES = 4 * 2 ** 20;
const PIECE_BYTES = 256 * 1024;

let folder: string;
let server: ChildProcess | undefined;

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "cowcatcher-blocking-"));
});

afterEach(() => {
  server?.kill("SIGKILL");
  rmSync(folder, { recursive: true, force: true });
});

interface Settings {
  sizeBytes?: number;
  isCancelled?: () => boolean;
}

async function connect(mode: string, { sizeBytes = DISK_BYTES, isCancelled = () => false }: Settings = {}) {
  const path = join(folder, "socket");
  server = spawn("python3", [SERVER, mode, path], { stdio: ["ignore", "pipe", "inherit"] });
  if (server.stdout !== null) await once(server.stdout, "data");
  return BlockingReader.open({ path, exportName: "", tls: undefined }, "the server", sizeBytes, isCancelled);
}

function diskBytes(offset: number, length: number): Uint8Array {
  return Uint8Array.from({ length }, (_, i) => ((offset + i) * 7) % 251);
}

describe.skipIf(libc === null)("BlockingReader", () => {
  it.each(["plain", "simple"])("reads any range, its pieces answered in any order: %s", async (mode) => {
    const reader = await connect(mode);
    expect(reader).not.toBeNull();
    for (const [offset, length] of [
      [0, 1],
      [PIECE_BYTES - 1, 2],
      [513, 3 * PIECE_BYTES],
      [0, DISK_BYTES],
    ] as const) {
      const buffer = new Uint8Array(length + 2).fill(0xee);
      expect(reader?.read(buffer, 1, length, offset)).toBe(true);
      expect(Buffer.compare(buffer.subarray(1, 1 + length), diskBytes(offset, length))).toBe(0);
      expect([buffer[0], buffer[length + 1]]).toEqual([0xee, 0xee]);
    }
    reader?.close();
  });

  it("takes data, holes and the end of a request in chunks of their own", async () => {
    const reader = await connect("pieces");
    const buffer = new Uint8Array(PIECE_BYTES).fill(0xee);
    expect(reader?.read(buffer, 0, PIECE_BYTES, 0)).toBe(true);
    expect(Buffer.compare(buffer.subarray(0, PIECE_BYTES / 2), diskBytes(0, PIECE_BYTES / 2))).toBe(0);
    expect(buffer.subarray(PIECE_BYTES / 2).every((byte) => byte === 0)).toBe(true);
    reader?.close();
  });

  it.each([
    "simple-error",
    "simple-unasked",
    "error",
    "other-cookie",
    "index",
    "elsewhere",
    "descending",
    "short",
    "long",
    "long-hole",
    "empty",
    "huge",
    "magic",
    "unknown",
    "none-first",
    "cut",
  ])("ends the connection, and writes nothing outside the range: %s", async (mode) => {
    const reader = await connect(mode);
    const buffer = new Uint8Array(3 * PIECE_BYTES + 2).fill(0xee);
    expect(reader?.read(buffer, 1, 3 * PIECE_BYTES, PIECE_BYTES)).toBe(false);
    expect([buffer[0], buffer[3 * PIECE_BYTES + 1]]).toEqual([0xee, 0xee]);
    // And no later read is tried on it.
    expect(reader?.read(buffer, 1, 512, 0)).toBe(false);
  });

  it("takes the other replies after an error, and says goodbye only then", async () => {
    const reader = await connect("late-error");
    const lines: string[] = [];
    const ended = new Promise((resolve) => server?.once("close", resolve));
    server?.stdout?.on("data", (text: Buffer) => lines.push(text.toString()));
    expect(reader?.read(new Uint8Array(3 * PIECE_BYTES), 0, 3 * PIECE_BYTES, 0)).toBe(false);
    await ended;
    // 2: NBD_CMD_DISC.
    expect(lines.join("").trim()).toBe("late 2");
  });

  it("notices an answer that comes twice", async () => {
    const reader = await connect("twice");
    const buffer = new Uint8Array(2 * PIECE_BYTES);
    expect(reader?.read(buffer, 0, 2 * PIECE_BYTES, 0)).toBe(false);
  });

  it("gives up on a silent server when it is told to", async () => {
    let asked = 0;
    const reader = await connect("silent", { isCancelled: () => ++asked > 2 });
    expect(reader?.read(new Uint8Array(512), 0, 512, 0)).toBe(false);
  });

  it("is not for another export, nor for TCP", async () => {
    expect(await connect("plain", { sizeBytes: DISK_BYTES + 512 })).toBeNull();
    const tcp = { host: "127.0.0.1", port: 1, exportName: "", tls: undefined };
    expect(await BlockingReader.open(tcp, "tcp", 0, () => false)).toBeNull();
  });
});
