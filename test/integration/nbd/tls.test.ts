// TLS against QEMU and libnbd: certificates, client certificates, pre-shared keys, and what is refused.
import { randomBytes } from "node:crypto";
import { readFileSync, writeFileSync } from "node:fs";
import { connect as connectTls } from "node:tls";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { CowcatcherError } from "../../../src/errors.js";
import { loadTlsCredentials } from "../../../src/nbd/server/tls.js";
import * as nbd from "../../../src/nbd/wire/protocol.js";
import { run } from "../../support/cli.js";
import { goData, optionBytes, RawClient } from "../../support/nbd-peer.js";
import { mustRun, scratchFolder, Server, stopAll, until } from "../../support/server.js";
import { makeTlsFiles, PSK_USER, type TlsFiles } from "../../support/tls-files.js";

const MiB = 1024 * 1024;
const CONTENT = randomBytes(2 * MiB);

let folder: string;
let files: TlsFiles;
let disk: string;

beforeAll(() => {
  folder = scratchFolder();
  files = makeTlsFiles(folder);
  disk = join(folder, "disk.raw");
});

beforeEach(() => {
  writeFileSync(disk, CONTENT);
});

let server: Server | undefined;
afterEach(async () => {
  await server?.stop();
  server = undefined;
});
afterAll(stopAll);

async function serve(...args: string[]): Promise<Server> {
  server = await Server.start(folder, [disk], { args: ["-f", "raw", ...args] });
  return server;
}

/** QEMU's options for the served disk. */
function qemuDisk({ socket }: Server): string[] {
  return ["--image-opts", `driver=nbd,path=${socket},export=disk,tls-creds=tls,tls-hostname=localhost`];
}

function x509(directory: string): string[] {
  return ["--object", `tls-creds-x509,id=tls,endpoint=client,dir=${directory},verify-peer=on`];
}

function libnbdUri({ socket }: Server, parameters: string, user?: string): string {
  return `nbds+unix://${user === undefined ? "" : `${user}@`}/disk?socket=${socket}&${parameters}`;
}

describe("certificates", () => {
  test("QEMU reads and writes; without TLS it is told what is wrong", async () => {
    const served = await serve("--tls", "require", "--tls-certificates", files.server);
    const io = ["-c", "read -v 0 16", "-c", "write -P 7 4k 1M", "-c", "flush", "-c", "read -P 7 5k 1M"];
    await run("qemu-io", [...x509(files.client), ...io, ...qemuDisk(served)]);
    expect(
      readFileSync(disk)
        .subarray(4096, 4096 + MiB)
        .every((byte) => byte === 7),
    ).toBe(true);
    const plain = await run("qemu-img", ["info", served.uri()]);
    expect(plain.code).not.toBe(0);
    expect(plain.stderr).toContain("TLS negotiation required");
  });

  test("libnbd copies over several connections, byte for byte, and leaves no descriptor open", async () => {
    const served = await serve("--tls-certificates", files.server);
    // Threads, which have descriptors of another kind, come as they please.
    const socketCount = (): number => served.openFiles().filter((path) => path.startsWith("socket:")).length;
    const before = socketCount();
    const uri = libnbdUri(served, `tls-certificates=${files.client}&tls-verify-peer=false`);
    const copy = join(folder, "copy.raw");
    await mustRun("nbdcopy", "--connections=3", "--requests=16", uri, copy);
    expect(readFileSync(copy).equals(CONTENT)).toBe(true);
    expect(await mustRun("nbdinfo", uri)).toContain("newstyle-fixed with TLS, using structured packets");
    await until("all descriptors are closed", () => socketCount() <= before);
  });

  test("with --tls-verify-peer, clients without a certificate or with another authority's are refused", async () => {
    const served = await serve("--tls-certificates", files.server, "--tls-verify-peer");
    const good = await run("qemu-img", ["info", ...x509(files.client), ...qemuDisk(served)]);
    expect(good.code).toBe(0);
    const strange = await run("qemu-img", ["info", ...x509(files.stranger), ...qemuDisk(served)]);
    expect(strange.code).not.toBe(0);
    const reply = await bareTls(served, files.server);
    expect(reply).toBe("closed");
    await until("the log tells why", () =>
      served.process.stderr.includes("peer did not return a certificate"),
    );
  });

  test("without it, a client needs none", async () => {
    const served = await serve("--tls-certificates", files.server);
    expect(await bareTls(served, files.server)).toBe("greeted");
  });
});

/** A client without a certificate: "greeted" if an option is answered over TLS. */
async function bareTls(served: Server, directory: string): Promise<"greeted" | "closed"> {
  const client = await upgraded(served);
  const ca = readFileSync(join(directory, "ca-cert.pem"));
  client.socket.removeAllListeners("data");
  const secured = connectTls({ socket: client.socket, ca, servername: "localhost" });
  const answer = await new Promise<"greeted" | "closed">((resolve) => {
    secured.on("error", () => undefined);
    // The raw socket allows half-open connections, so the end is all that is seen of a server that hangs up.
    secured.on("end", () => resolve("closed"));
    secured.on("close", () => resolve("closed"));
    secured.once("data", () => resolve("greeted"));
    secured.once("secureConnect", () => secured.write(optionBytes(nbd.NBD_OPT_LIST)));
  });
  secured.destroy();
  return answer;
}

/** STARTTLS is acknowledged. */
async function upgraded(served: Server): Promise<RawClient> {
  const client = new RawClient(served.socket);
  await client.read(18);
  client.send(Buffer.from([0, 0, 0, 3]));
  expect((await client.option(nbd.NBD_OPT_STARTTLS)).map(({ type }) => type)).toEqual([nbd.NBD_REP_ACK]);
  return client;
}

describe("pre-shared keys", () => {
  const psk = (user: string): string[] => [
    "--object",
    `tls-creds-psk,id=tls,endpoint=client,dir=${files.pskFolder},username=${user}`,
  ];

  test("QEMU and libnbd with the right key", async () => {
    const served = await serve("--tls-psk", files.psk);
    await mustRun(
      "qemu-img",
      "compare",
      ...psk(PSK_USER),
      "--image-opts",
      qemuDisk(served)[1] ?? "",
      `driver=raw,file.filename=${disk}`,
    );
    const uri = libnbdUri(served, `tls-psk-file=${files.psk}`, PSK_USER);
    expect(await mustRun("nbdinfo", "--size", uri)).toBe(`${CONTENT.length}\n`);
  });

  test("an unknown user is refused, and so is a wrong key", async () => {
    const served = await serve("--tls-psk", files.psk);
    const wrong = join(folder, "wrong.psk");
    writeFileSync(wrong, `${PSK_USER}:${"00".repeat(32)}\nmallory:${"5c".repeat(32)}\n`);
    for (const user of [PSK_USER, "mallory"]) {
      const { code } = await run("nbdinfo", [libnbdUri(served, `tls-psk-file=${wrong}`, user)]);
      expect(code).not.toBe(0);
    }
    await until("the log tells", () => served.process.stderr.includes("TLS handshake failed"));
  });
});

describe("plain text around STARTTLS", () => {
  test("an option in the same packet ends the connection before TLS begins", async () => {
    const served = await serve("--tls-certificates", files.server);
    const client = new RawClient(served.socket);
    await client.read(18);
    client.send(
      Buffer.from([0, 0, 0, 3]),
      optionBytes(nbd.NBD_OPT_STARTTLS),
      optionBytes(nbd.NBD_OPT_GO, goData("disk")),
    );
    // The acknowledgement of STARTTLS and nothing more.
    expect((await client.readToEnd()).length).toBe(20);
    await until("the log tells", () => served.process.stderr.includes("plain text behind STARTTLS"));
  });

  test("an option after the acknowledgement is no TLS, and is never answered", async () => {
    const served = await serve("--tls-certificates", files.server);
    const client = await upgraded(served);
    client.send(optionBytes(nbd.NBD_OPT_GO, goData("disk")));
    const rest = await client.readToEnd();
    // At most an alert record.
    expect(rest.length).toBeLessThan(20);
    expect(rest.includes(Buffer.from("IHAVEOPT"))).toBe(false);
  });

  test("a client that stops in the middle of the TLS handshake does not hold up others", async () => {
    const served = await serve("--tls-certificates", files.server);
    const stuck = await upgraded(served);
    stuck.send(Buffer.from([22, 3, 1]));
    const uri = libnbdUri(served, `tls-certificates=${files.client}&tls-verify-peer=false`);
    expect(await mustRun("nbdinfo", "--size", uri)).toBe(`${CONTENT.length}\n`);
    stuck.destroy();
  });
});

describe("files that cannot be used are named at the start", () => {
  test("a folder without a key, a key file without keys", async () => {
    await expect(serve("--tls-certificates", files.pskFolder)).rejects.toThrow(
      /server-cert\.pem: cannot read it for TLS: no such file/,
    );
    expect(() =>
      loadTlsCredentials({ kind: "certificates", folder: files.client, verifyPeer: false }),
    ).toThrow(/server-cert\.pem: cannot read it for TLS: no such file/);
  });

  test.each([
    ["alice", "line 1 is not USERNAME:HEXKEY"],
    ["alice:xyz", "line 1 is not USERNAME:HEXKEY"],
    ["ok:00\n:00", "line 2 is not USERNAME:HEXKEY"],
    [`alice:${"00".repeat(257)}`, "line 1 is not USERNAME:HEXKEY"],
    ["# nothing", "holds no key"],
  ])("keys: %j", (text, problem) => {
    const file = join(folder, "bad.psk");
    writeFileSync(file, text);
    expect(() => loadTlsCredentials({ kind: "psk", file })).toThrow(problem);
    expect(() => loadTlsCredentials({ kind: "psk", file })).toThrow(CowcatcherError);
  });

  test("a key that belongs to another certificate", () => {
    const odd = join(folder, "odd");
    const copy = (from: string, to: string): void => {
      writeFileSync(join(odd, to), readFileSync(from));
    };
    makeTlsFiles(odd);
    copy(join(files.server, "server-cert.pem"), "server-cert.pem");
    copy(join(odd, "server", "server-key.pem"), "server-key.pem");
    expect(() => loadTlsCredentials({ kind: "certificates", folder: odd, verifyPeer: false })).toThrow(
      /cannot be used for TLS/,
    );
  });
});
