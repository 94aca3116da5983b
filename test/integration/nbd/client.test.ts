// The NBD client against other projects' servers.
import { spawn, type ChildProcess } from "node:child_process";
import { existsSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, expect, it } from "vitest";
import { CowcatcherError } from "../../../src/errors.js";
import { NbdClient } from "../../../src/nbd/client/client.js";
import { run } from "../../support/cli.js";
import { Random } from "../../support/random.js";

const MiB = 1024 * 1024;
const folder = (): string => {
  const path = mkdtempSync(join(tmpdir(), "cowcatcher-nbd-client-"));
  cleanups.push(() => rmSync(path, { recursive: true, force: true }));
  return path;
};
const cleanups: (() => unknown)[] = [];
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
});

/** Starts a server and waits until its socket's file is there. */
async function start(program: string, args: string[], socketPath: string): Promise<void> {
  const child: ChildProcess = spawn(program, args, { stdio: ["ignore", "ignore", "inherit"] });
  const ended = new Promise<void>((resolve) => child.once("close", () => resolve()));
  cleanups.push(() => {
    child.kill("SIGKILL");
    return ended;
  });
  const deadline = Date.now() + 60_000;
  while (!existsSync(socketPath)) {
    if (Date.now() > deadline || child.exitCode !== null) throw new Error(`${program} does not listen`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

async function qemuNbd(format: "raw" | "qcow2"): Promise<NbdClient> {
  const path = folder();
  const [image, socket] = [join(path, "disk"), join(path, "nbd.sock")];
  if (format === "raw") writeFileSync(image, Buffer.alloc(4 * MiB));
  else await run("qemu-img", ["create", "-q", "-f", "qcow2", image, "4M"]);
  await start("qemu-nbd", ["-f", format, "-k", socket, "-x", "disk", "--discard=unmap", image], socket);
  return connect(`nbd+unix:///disk?socket=${socket}`);
}

async function nbdkit(args: string[]): Promise<NbdClient> {
  const socket = join(folder(), "nbd.sock");
  await start("nbdkit", ["-f", "-U", socket, ...args], socket);
  return connect(`nbd+unix:///?socket=${socket}`);
}

/** A server binds its socket a moment before it listens on it, and a probe would use up qemu-nbd's one client. */
async function connect(uri: string): Promise<NbdClient> {
  const deadline = Date.now() + 60_000;
  for (;;) {
    try {
      const client = await NbdClient.connect(uri);
      cleanups.push(() => client.destroy());
      return client;
    } catch (error) {
      const refused = error instanceof CowcatcherError && error.errno === "ECONNREFUSED";
      if (!refused || Date.now() > deadline) throw error;
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
  }
}

/** Random requests, several at a time, none overlapping another in flight; then every byte against a model. */
async function checkAgainstModel(client: NbdClient, requestCount: number): Promise<void> {
  const random = new Random(17);
  const model = Buffer.alloc(client.sizeBytes);
  const pieceBytes = client.sizeBytes / 16;
  for (let done = 0; done < requestCount; done += 16) {
    await Promise.all(
      Array.from({ length: 16 }, async (_, piece) => {
        const start = piece * pieceBytes + 512 * random.below(pieceBytes / 1024);
        const lengthBytes = 512 * (1 + random.below(pieceBytes / 1024));
        if (random.chance(0.2)) {
          model.fill(0, start, start + lengthBytes);
          await client.writeZeroes(start, lengthBytes);
        } else if (random.chance(0.3)) {
          const read = Buffer.alloc(lengthBytes);
          await client.read(read, 0, lengthBytes, start);
          expect(read.equals(model.subarray(start, start + lengthBytes))).toBe(true);
        } else {
          model.fill(1 + random.below(255), start, start + lengthBytes);
          await client.write(model, start, lengthBytes, start, { fua: random.chance(0.05) });
        }
      }),
    );
  }
  await client.flush();
  const all = Buffer.alloc(client.sizeBytes);
  await client.read(all, 0, all.length, 0);
  expect(all.equals(model)).toBe(true);
  await client.trim(0, MiB);
}

it("does random requests on qemu-nbd as its model says, raw", async () => {
  const client = await qemuNbd("raw");
  expect(client.canMultiConn || client.canTrim).toBe(true);
  await checkAgainstModel(client, 320);
  await client.disconnect();
});

it("does random requests on qemu-nbd as its model says, qcow2", async () => {
  const client = await qemuNbd("qcow2");
  await checkAgainstModel(client, 320);
  await client.disconnect();
});

it("matches replies that come out of order", async () => {
  // Sixteen threads sleep and answer, each when it wakes up.
  const client = await nbdkit(["--filter=delay", "pattern", "1M", "delay-read=2ms", "--threads=16"]);
  const buffers = Array.from({ length: 128 }, () => Buffer.alloc(4096));
  await Promise.all(buffers.map((buffer, i) => client.read(buffer, 0, 4096, i * 8192)));
  for (const [i, buffer] of buffers.entries()) {
    // nbdkit's pattern: each 64-bit word holds its own offset.
    expect(buffer.readBigUInt64BE(0)).toBe(BigInt(i * 8192));
    expect(buffer.readBigUInt64BE(4088)).toBe(BigInt(i * 8192 + 4088));
  }
  await client.disconnect();
});

it("carries a server's errno", async () => {
  const client = await nbdkit([
    "--filter=error",
    "memory",
    "1M",
    "error-pwrite=ENOSPC",
    "error-pwrite-rate=1",
  ]);
  const error: unknown = await client
    .write(Buffer.alloc(4096), 0, 4096, 8192)
    .catch((reason: unknown) => reason);
  expect(error).toBeInstanceOf(CowcatcherError);
  expect(error).toMatchObject({ code: "NO_SPACE", errno: "ENOSPC", offsetBytes: 8192 });
  await client.read(Buffer.alloc(4096), 0, 4096, 8192);
});

it("keeps to a server's block sizes, and to a read-only export", async () => {
  const blocks = await nbdkit(["--filter=blocksize-policy", "memory", "1M", "blocksize-minimum=4096"]);
  expect(blocks.info.minimumBlockBytes).toBe(4096);
  await expect(blocks.read(Buffer.alloc(512), 0, 512, 0)).rejects.toMatchObject({ errno: "EINVAL" });
  const readOnly = await nbdkit(["-r", "memory", "1M"]);
  expect(readOnly.readOnly).toBe(true);
  await expect(readOnly.write(Buffer.alloc(512), 0, 512, 0)).rejects.toMatchObject({ errno: "EPERM" });
});
