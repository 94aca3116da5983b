// The server against real clients: fio, qemu-io, qemu-img, nbdcopy, nbdinfo and libnbd's Python binding.

import { execFile } from "node:child_process";
import { createHash, randomBytes } from "node:crypto";
import {
  ftruncateSync,
  mkdtempSync,
  openSync,
  readFileSync,
  rmSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { openRaw, type RawImage } from "../../../src/image/raw.js";
import type { NbdExport } from "../../../src/nbd/server/export.js";
import { TestServer } from "../../support/nbd-peer.js";

const MiB = 1024 * 1024;
const runFile = promisify(execFile);

let folder: string;
let running: TestServer | undefined;
let image: RawImage | undefined;

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "cowcatcher-nbd-peers-"));
});

afterEach(async () => {
  await running?.stop();
  await image?.close();
  running = undefined;
  image = undefined;
  rmSync(folder, { recursive: true, force: true });
});

/** Runs a client; its output is in the error when it fails. */
async function run(program: string, ...options: string[]): Promise<string> {
  const { stdout } = await runFile(program, options, { cwd: folder, maxBuffer: 16 * MiB, timeout: 150_000 });
  return stdout;
}

/** Serves `content`, or that many empty bytes, from a raw file. */
async function serve(content: Buffer | number, fields: Partial<NbdExport> = {}): Promise<TestServer> {
  const path = join(folder, "disk.raw");
  const fd = openSync(path, "w+");
  if (typeof content === "number") ftruncateSync(fd, content);
  else writeSync(fd, content);
  image = await openRaw({ path, name: path, fd, readOnly: false, direct: false, probed: false });
  running = await TestServer.start(image, fields);
  return running;
}

function diskContent(): Buffer {
  return readFileSync(join(folder, "disk.raw"));
}

function hash(bytes: Buffer): string {
  return createHash("sha1").update(bytes).digest("hex");
}

/** libnbd's binding belongs to the system's Python, which may not be the first in the path. */
async function python(script: string, ...options: string[]): Promise<string> {
  for (const program of ["python3", "/usr/bin/python3"]) {
    const works = await run(program, "-c", "import nbd").then(
      () => true,
      () => false,
    );
    if (works) return run(program, "-c", script, ...options);
  }
  throw new Error("no python3 has the nbd module (python3-libnbd)");
}

const CONNECT = `
import nbd, sys, errno
def connect(contexts=True, structured=True):
    h = nbd.NBD()
    if contexts: h.add_meta_context("base:allocation")
    h.set_request_structured_replies(structured)
    h.set_strict_mode(0)
    h.connect_uri(sys.argv[1])
    return h
def error_of(call):
    try: call()
    except nbd.Error as e: return errno.errorcode[e.errnum]
    return "none"
h = connect()
`;

describe("fio", () => {
  test.each([
    ["randwrite", "32k", "8"],
    ["randrw", "4k", "32"],
  ])("%s of %s, %s deep, verifies", async (rw, blockSize, depth) => {
    const server = await serve(32 * MiB);
    const output = await run(
      "fio",
      ...["--ioengine=nbd", `--uri=${server.uri}`, `--rw=${rw}`, `--bs=${blockSize}`, `--iodepth=${depth}`],
      ...["--size=32M", "--verify=crc32c", "--verify_fatal=1", "--randseed=7", "--name=job"],
    );
    expect(output).toContain("err= 0");
    expect(server.warnings).toEqual([]);
  });
});

describe("QEMU", () => {
  test("qemu-io writes, zeroes, discards, flushes and reads back", async () => {
    const server = await serve(4 * MiB);
    const commands = [
      "write -P 0x5a 4k 64k",
      "write -P 0x11 1001 77",
      "write -f -P 0x22 1M 2M",
      "write -z 8k 4k",
      "write -z -u 16k 4k",
      "discard 3M 1M",
      "flush",
      "read -P 0x5a 4k 4k",
      "read -P 0 8k 4k",
      "read -P 0 16k 4k",
      "read -P 0x11 1001 77",
      "read -P 0x22 1M 2M",
    ];
    const output = await run("qemu-io", "-f", "raw", ...commands.flatMap((c) => ["-c", c]), server.uri);
    expect(output).not.toMatch(/fail|error/i);
    const content = diskContent();
    expect(content.subarray(MiB, 3 * MiB).every((byte) => byte === 0x22)).toBe(true);
    expect(content.subarray(8192, 12288).every((byte) => byte === 0)).toBe(true);
  });

  test("qemu-io cannot write a read-only export", async () => {
    const server = await serve(MiB, { readOnly: true });
    const output = await run("qemu-io", "-r", "-f", "raw", "-c", "read -P 0 0 1M", server.uri);
    expect(output).toContain("read 1048576/1048576 bytes");
    await expect(run("qemu-io", "-f", "raw", "-c", "write 0 4k", server.uri)).rejects.toThrow(
      /read-only|not permitted|Permission denied/i,
    );
  });

  test("qemu-img convert, both ways", async () => {
    const content = Buffer.concat([randomBytes(3 * MiB), Buffer.alloc(5 * MiB), randomBytes(MiB)]);
    const server = await serve(content.length);
    writeFileSync(join(folder, "source.raw"), content);
    await run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "source.raw", server.uri);
    expect(hash(diskContent())).toBe(hash(content));
    await run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", server.uri, "copy.qcow2");
    await run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", "source.raw", "copy.qcow2");
    const map = JSON.parse(await run("qemu-img", "map", "--output=json", "-f", "raw", server.uri)) as {
      zero: boolean;
    }[];
    expect(map.some(({ zero }) => zero)).toBe(true);
  });
});

describe("libnbd's tools", () => {
  test("nbdinfo shows what is offered", async () => {
    const server = await serve(MiB, { description: "a disk for tests" });
    const { exports } = JSON.parse(await run("nbdinfo", "--json", server.uri)) as {
      exports: Record<string, unknown>[];
    };
    expect(exports[0]).toMatchObject({
      "export-name": "disk",
      description: "a disk for tests",
      "export-size": MiB,
      contexts: ["base:allocation"],
      is_read_only: false,
      can_flush: true,
      can_fua: true,
      can_trim: true,
      can_zero: true,
      can_df: true,
      can_multi_conn: true,
      can_cache: true,
      block_size_minimum: 1,
      block_size_preferred: 4096,
      block_size_maximum: 32 * MiB,
    });
    const list = await run("nbdinfo", "--list", "--json", server.uri);
    expect(list).toContain('"export-name": "disk"');
  });

  test("nbdinfo --map shows holes", async () => {
    const server = await serve(4 * MiB);
    const fd = openSync(join(folder, "disk.raw"), "r+");
    writeSync(fd, randomBytes(MiB), 0, MiB, MiB);
    const map = JSON.parse(await run("nbdinfo", "--map", "--json", server.uri)) as unknown[];
    expect(map).toEqual([
      { offset: 0, length: MiB, type: 3, description: "hole,zero" },
      { offset: MiB, length: MiB, type: 0, description: "data" },
      { offset: 2 * MiB, length: 2 * MiB, type: 3, description: "hole,zero" },
    ]);
  });

  test.each([4097, 8 * MiB + 513])(
    "nbdcopy of %i bytes over several connections, both ways",
    async (size) => {
      const content = randomBytes(size);
      content.fill(0, Math.floor(size / 4), Math.floor(size / 2));
      writeFileSync(join(folder, "source.raw"), content);
      const server = await serve(size);
      await run("nbdcopy", "--connections=4", "source.raw", server.uri);
      expect(hash(diskContent())).toBe(hash(content));
      await run("nbdcopy", "--connections=4", server.uri, "copy.raw");
      expect(hash(readFileSync(join(folder, "copy.raw")))).toBe(hash(content));
      expect(server.warnings).toEqual([]);
    },
  );
});

describe("libnbd", () => {
  test("a disk of 4097 bytes: its last byte, and what lies beyond", async () => {
    const server = await serve(Buffer.alloc(4097, 65));
    const script = `${CONNECT}
assert h.get_size() == 4097
assert h.pread(1, 4096) == b"A"
print(error_of(lambda: h.pread(2, 4096)), error_of(lambda: h.pread(512, 1 << 40)),
      error_of(lambda: h.pwrite(b"xx", 4096)), error_of(lambda: h.zero(2, 4096)),
      error_of(lambda: h.trim(2, 4096)), error_of(lambda: h.cache(2, 4096)),
      error_of(lambda: h.block_status(2, 4096, lambda *a: 0)))
# What the file system can do decides.
assert error_of(lambda: h.zero(1, 0, nbd.CMD_FLAG_FAST_ZERO)) in ("none", "ENOTSUP")
h.pwrite(b"z", 4096, nbd.CMD_FLAG_FUA); h.zero(4097, 0, nbd.CMD_FLAG_NO_HOLE); assert h.pread(4097, 0) == bytes(4097)
h.shutdown()`;
    expect((await python(script, server.uri)).trim()).toBe(
      "EINVAL EINVAL ENOSPC ENOSPC EINVAL EINVAL EINVAL",
    );
  });

  test("structured reads tell data from holes, DF does not, and simple replies agree", async () => {
    const server = await serve(MiB);
    const script = `${CONNECT}
h.pwrite(b"d" * 65536, 262144)
kinds = []
def chunk(subbuf, offset, status, error): kinds.append((offset, len(subbuf), status))
whole = h.pread_structured(1048576, 0, chunk)
assert nbd.READ_HOLE in [k[2] for k in kinds] and nbd.READ_DATA in [k[2] for k in kinds], kinds
assert sum(k[1] for k in kinds) == 1048576
kinds.clear()
assert h.pread_structured(1048576, 0, chunk, nbd.CMD_FLAG_DF) == whole
assert [k[2] for k in kinds] == [nbd.READ_DATA]
simple = connect(structured=False)
assert not simple.get_structured_replies_negotiated()
assert simple.pread(1048576, 0) == whole
assert not simple.can_meta_context("base:allocation")
print("ok")`;
    expect((await python(script, server.uri)).trim()).toBe("ok");
  });

  test("what one connection wrote and flushed, another reads", async () => {
    const server = await serve(MiB);
    const script = `${CONNECT}
assert h.can_multi_conn()
other = connect()
for i in range(200):
    h.pwrite(bytes([i]) * 4096, i * 4096); other.flush()
    assert other.pread(4096, i * 4096) == bytes([i]) * 4096
print("ok")`;
    expect((await python(script, server.uri)).trim()).toBe("ok");
  });

  test("many requests at once, answered in any order, land where they belong", async () => {
    const server = await serve(16 * MiB);
    const script = `${CONNECT}
import os
parts = [os.urandom(65536) for i in range(256)]
todo = [h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(p)), i * 65536) for i, p in enumerate(parts)]
while h.aio_in_flight() > 0: h.poll(-1)
assert all(h.aio_command_completed(c) for c in todo)
assert h.pread(16777216, 0) == b"".join(parts)
print("ok")`;
    expect((await python(script, server.uri)).trim()).toBe("ok");
  });
});
