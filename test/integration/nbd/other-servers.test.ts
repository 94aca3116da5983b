// Servers with habits of their own: one that ends with its last client, one whose blocks do not divide its size, those
// that know only the protocol's older ways.
import { existsSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { connect, createServer, type Server as NetServer, type Socket } from "node:net";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { cowcatcher } from "../../support/cli.js";
import { noise } from "../../support/disks.js";
import { Process, scratchFolder, stopAll, until } from "../../support/server.js";

const MiB = 1024 * 1024;
let folder: string;
let socket: string;

beforeEach(() => {
  folder = scratchFolder();
  socket = join(folder, "nbd.sock");
});
afterEach(stopAll);

/** Not asked whether it is there by connecting: that client would be its last. */
async function nbdkit(...args: string[]): Promise<Process> {
  const server = new Process("nbdkit", ["-f", "-U", socket, ...args]);
  await until("nbdkit listens", () => existsSync(socket) || server.over);
  return server;
}

describe("a server that ends with its last client", () => {
  const content = noise(8 * MiB);

  it.each(["1", "4"])("is a source for %s workers", async (workers) => {
    writeFileSync(join(folder, "disk.raw"), content);
    const server = await nbdkit("-r", "--filter=exitlast", "file", join(folder, "disk.raw"));
    const target = join(folder, "out.raw");
    const args = ["backup", "-q", "-w", workers, `nbd+unix:///?socket=${socket}`, target];
    const { code, stderr } = await cowcatcher(args);
    expect(`${code} ${stderr}`).toBe("0 ");
    expect(Buffer.compare(readFileSync(target), content)).toBe(0);
    // It has seen its last client.
    expect((await server.end()).code).toBe(0);
  });

  it("is a target", async () => {
    const [disk, exported] = [join(folder, "disk.raw"), join(folder, "exported.raw")];
    writeFileSync(disk, content);
    writeFileSync(exported, Buffer.alloc(content.length));
    const server = await nbdkit("--filter=exitlast", "file", exported);
    const { code, stderr } = await cowcatcher([
      "backup",
      "-q",
      "-f",
      "raw",
      disk,
      `nbd+unix:///?socket=${socket}`,
    ]);
    expect(`${code} ${stderr}`).toBe("0 ");
    expect((await server.end()).code).toBe(0);
    expect(Buffer.compare(readFileSync(exported), content)).toBe(0);
  });

  it("does not cost another the place of a worker: as many clients at a time as there are workers", async () => {
    const disk = join(folder, "disk.raw");
    writeFileSync(disk, content);
    const args = ["-t", "-r", "--shared=2", "-f", "raw", "-k", socket, disk];
    const server = new Process("qemu-nbd", args);
    await until("qemu-nbd listens", () => existsSync(socket) || server.over);
    const target = join(folder, "out.raw");
    const { code, stderr } = await cowcatcher([
      "backup",
      "-q",
      "-w",
      "2",
      `nbd+unix:///?socket=${socket}`,
      target,
    ]);
    expect(`${code} ${stderr}`).toBe("0 ");
    expect(Buffer.compare(readFileSync(target), content)).toBe(0);
  });
});

it("a server whose smallest block does not divide its size is refused at the start, in these words", async () => {
  await nbdkit("--filter=blocksize-policy", "memory", "10000", "blocksize-minimum=4096");
  const target = join(folder, "out.raw");
  const { code, stderr } = await cowcatcher(["backup", "-q", `nbd+unix:///?socket=${socket}`, target]);
  expect(code).toBe(1);
  expect(stderr).toContain(
    "the export's 10000 bytes are no multiple of the server's smallest block, 4096 bytes",
  );
  expect(existsSync(target)).toBe(false);
});

const GO = 7;
const ERR_UNSUP = 0x80000001;
const OPTION_BYTES = 16;

/** In front of the server at `behind`: hands everything on, but does not know GO. */
async function withoutGo(behind: string, front: string): Promise<NetServer> {
  const relay = createServer((client) => {
    const server = connect(behind);
    for (const socket of [client, server]) socket.on("error", () => undefined);
    client.on("close", () => server.destroy());
    server.on("close", () => client.destroy());
    server.pipe(client);
    handOnOptions(client, server);
  });
  await new Promise<void>((resolve) => relay.listen(front, resolve));
  return relay;
}

function handOnOptions(client: Socket, server: Socket): void {
  let held = Buffer.alloc(0);
  let hasFlags = false;
  const onData = (bytes: Buffer): void => {
    held = Buffer.concat([held, bytes]);
    if (!hasFlags && held.length >= 4) {
      server.write(held.subarray(0, 4));
      held = held.subarray(4);
      hasFlags = true;
    }
    while (hasFlags && held.length >= OPTION_BYTES) {
      const option = held.readUInt32BE(8);
      const end = OPTION_BYTES + held.readUInt32BE(12);
      if (held.length < end) return;
      if (option === GO) {
        const reply = Buffer.alloc(20);
        reply.writeBigUInt64BE(0x0003e889045565a9n);
        reply.writeUInt32BE(GO, 8);
        reply.writeUInt32BE(ERR_UNSUP, 12);
        client.write(reply);
      } else {
        server.write(held.subarray(0, end));
      }
      held = held.subarray(end);
      if (option !== 1) continue;
      // EXPORT_NAME: what follows is no option.
      client.off("data", onData);
      server.write(held);
      client.pipe(server);
      return;
    }
  };
  client.on("data", onData);
}

describe("a server of the protocol's older ways", () => {
  const content = noise(4 * MiB);
  const uri = (name = "") => `nbd+unix:///${name}?socket=${socket}`;
  let disk: string;
  let target: string;

  beforeEach(() => {
    disk = join(folder, "disk.raw");
    target = join(folder, "out.raw");
    writeFileSync(disk, content);
  });

  async function expectCopied(name = ""): Promise<void> {
    const { code, stderr } = await cowcatcher(["backup", "-q", "--verify", uri(name), target]);
    expect(`${code} ${stderr}`).toBe("0 ");
    expect(Buffer.compare(readFileSync(target), content)).toBe(0);
    rmSync(target);
  }

  async function expectRefused(name: string, words: string): Promise<void> {
    const { code, stderr } = await cowcatcher(["backup", "-q", uri(name), target]);
    expect(code).toBe(1);
    expect(stderr).toContain(words);
    expect(existsSync(target)).toBe(false);
  }

  it("oldstyle is a source, without a name", async () => {
    await nbdkit("-o", "-r", "file", disk);
    await expectCopied();
    await expectRefused("disk", "an oldstyle server cannot be asked for export 'disk'");
  });

  it("oldstyle is a target", async () => {
    const exported = join(folder, "exported.raw");
    writeFileSync(exported, Buffer.alloc(content.length));
    // Neither flushes nor zeroes: in oldstyle nbdkit 1.32 says that it has them, and refuses them then.
    for (let at = 0; at < content.length; at += 512) content[at] = 1;
    writeFileSync(disk, content);
    const dd = "dd status=none iflag=fullblock,skip_bytes,count_bytes";
    await nbdkit(
      "-o",
      "eval",
      `get_size=echo ${content.length}`,
      `pread=${dd} if=${exported} skip=$4 count=$3`,
      `pwrite=dd status=none iflag=fullblock of=${exported} bs=1M seek=$4 oflag=seek_bytes conv=notrunc`,
    );
    const { code, stderr } = await cowcatcher(["backup", "-q", "-f", "raw", "--verify", disk, uri()]);
    expect(`${code} ${stderr}`).toBe("0 ");
    expect(Buffer.compare(readFileSync(exported), content)).toBe(0);
  });

  it.each([["0"], ["1"], ["2"]])("newstyle with handshake flags masked by %s is a source", async (mask) => {
    await nbdkit(`--mask-handshake=${mask}`, "-r", "file", disk);
    await expectCopied("any");
  });

  it("fixed newstyle without GO is a source, and says so of an export that it has not", async () => {
    const behind = join(folder, "behind.sock");
    const server = new Process("qemu-nbd", [
      "-t",
      "-r",
      "-e",
      "8",
      "-x",
      "disk",
      "-f",
      "raw",
      "-k",
      behind,
      disk,
    ]);
    await until("qemu-nbd listens", () => existsSync(behind) || server.over);
    const relay = await withoutGo(behind, socket);
    try {
      await expectCopied("disk");
      await expectRefused("other", "the server hung up when it was asked for export 'other'");
    } finally {
      relay.close();
    }
  });

  it("has no TLS where the user wants it: nothing is sent in the clear", async () => {
    for (const style of ["-o", "--mask-handshake=0"]) {
      const place = join(folder, `tls${style}.sock`);
      const server = new Process("nbdkit", ["-f", "-U", place, style, "-r", "file", disk]);
      await until("nbdkit listens", () => existsSync(place) || server.over);
      const { code, stderr } = await cowcatcher([
        "backup",
        "-q",
        `nbds+unix:///?socket=${place}&tls-verify-peer=0`,
        target,
      ]);
      expect(code).toBe(1);
      expect(stderr).toContain("the server has no TLS");
    }
  });
});
