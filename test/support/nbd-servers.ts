// Other projects' NBD servers for the tests: started, waited for, stopped; and the keys that TLS needs.
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { expect } from "vitest";
import { NbdClient } from "../../src/nbd/client/client.js";
import { COWCATCHER_BIN, cowcatcher, run } from "./cli.js";
import { Process, scratchFolder } from "./server.js";

const START_MS = 60_000;
const MiB = 1024 * 1024;

export interface RunningServer {
  uri: string;
  socket: string;
  process: Process;
}

/** Starts a server on a Unix socket and waits until a client gets through; `extra` goes into the URI. */
export async function startServer(
  program: string,
  args: (socket: string) => string[],
  { socket = join(scratchFolder(), "nbd.sock"), exportName = "", scheme = "nbd+unix://", extra = "" } = {},
): Promise<RunningServer> {
  const process = new Process(program, args(socket));
  const uri = `${scheme}/${exportName}?socket=${socket}${extra}`;
  const deadline = Date.now() + START_MS;
  for (;;) {
    try {
      await (await NbdClient.connect(uri)).disconnect();
      return { uri, socket, process };
    } catch (error) {
      if (Date.now() > deadline) throw error;
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  }
}

export function nbdkit(...args: string[]): Promise<RunningServer> {
  return startServer("nbdkit", (socket) => ["-f", "-U", socket, ...args]);
}

/** With `--shared=8` unless told otherwise: several clients at a time, and CAN_MULTI_CONN. */
export function qemuNbd(image: string, ...args: string[]): Promise<RunningServer> {
  return startServer("qemu-nbd", (socket) => ["-t", "--shared=8", "-f", "raw", "-k", socket, ...args, image]);
}

/** A certificate authority, a server's certificate for localhost, and a client's, in one folder. */
export async function makeCertificates(): Promise<string> {
  const folder = scratchFolder();
  const openssl = async (...args: string[]): Promise<void> => {
    const { code, stderr } = await run("openssl", args, { cwd: folder });
    if (code !== 0) throw new Error(`openssl: ${stderr}`);
  };
  const key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
  await openssl("req", "-x509", ...key, "-keyout", "ca-key.pem", "-out", "ca-cert.pem", "-subj", "/CN=ca");
  writeFileSync(join(folder, "names"), "subjectAltName=DNS:localhost,IP:127.0.0.1\n");
  for (const [name, subject] of [
    ["server", "localhost"],
    ["client", "client"],
  ]) {
    await openssl(
      "req",
      ...key,
      "-keyout",
      `${name}-key.pem`,
      "-out",
      `${name}.csr`,
      "-subj",
      `/CN=${subject}`,
    );
    const sign = ["-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-CAcreateserial", "-extfile", "names"];
    await openssl("x509", "-req", "-in", `${name}.csr`, "-out", `${name}-cert.pem`, "-days", "2", ...sign);
  }
  return folder;
}

/** Bytes that are not zero, except for the given stretches. */
export function diskBytes(sizeBytes: number, holes: readonly [from: number, to: number][] = []): Buffer {
  const bytes = Buffer.alloc(sizeBytes);
  let state = 0x9e3779b9;
  for (let at = 0; at + 4 <= sizeBytes; at += 4) {
    state = Math.imul(state ^ (state >>> 15), 0x85ebca6b) + at;
    bytes.writeInt32LE(state | 1, at);
  }
  for (const [from, to] of holes) bytes.fill(0, from, to);
  return bytes;
}

export function sameBytes(path: string, expected: Buffer): boolean {
  return readFileSync(path).subarray(0, expected.length).equals(expected);
}

// A disk for all tests: data, a hole, and a hole within data.
export const SIZE = 6 * MiB;
export const disk = diskBytes(SIZE, [
  [1 * MiB, 2 * MiB],
  [3 * MiB + 4096, 3 * MiB + 12_288],
]);

export function file(content: Buffer): string {
  const path = join(scratchFolder(), "disk.raw");
  writeFileSync(path, content);
  return path;
}

export async function succeeds(args: string[], env: Record<string, string> = {}): Promise<string> {
  const { code, stdout, stderr } = await cowcatcher(args, { env });
  expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
  return stdout;
}

export async function fails(args: string[], expectedCode = 1): Promise<string> {
  const { code, stderr } = await cowcatcher(args);
  expect(code).toBe(expectedCode);
  expect(stderr).toMatch(/^cowcatcher: .*\n$/);
  return stderr;
}

export async function lastLine(args: string[]): Promise<string> {
  return (await succeeds(args)).trim().split("\n").at(-1) ?? "";
}

export function startBackup(args: string[]): Process {
  return new Process(process.execPath, [COWCATCHER_BIN, ...args]);
}

export function hasBegun(backup: Process): Promise<string> {
  return backup.line((line) => /"status".*"bytes_done":[1-9]/.test(line));
}

/** What a server holds, as nbdcopy reads it. */
export async function contentOf({ uri }: RunningServer): Promise<Buffer> {
  const path = join(scratchFolder(), "read.raw");
  expect(await run("nbdcopy", [uri, path])).toMatchObject({ code: 0 });
  return readFileSync(path);
}
