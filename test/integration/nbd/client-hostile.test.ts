// The command line's client in front of servers that deceive it or leave it waiting.
import { readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, describe, expect, it } from "vitest";
import { cowcatcher } from "../../support/cli.js";
import { NBD_CMD_WRITE, NBD_EIO } from "../../../src/nbd/wire/protocol.js";
import { EXIT } from "../../../src/cli/output/exit-codes.js";
import {
  diskBytes,
  file,
  hasBegun,
  makeCertificates,
  nbdkit,
  startBackup,
  startServer,
} from "../../support/nbd-servers.js";
import { ScriptedServer, type ScriptOptions } from "../../support/nbd-script.js";
import { scratchFolder, stopAll } from "../../support/server.js";

const MiB = 1024 * 1024;
const servers: ScriptedServer[] = [];

afterEach(async () => {
  await stopAll();
  for (const server of servers.splice(0)) await server.stop();
});

async function startScript(options: ScriptOptions): Promise<ScriptedServer> {
  const server = await ScriptedServer.start(options);
  servers.push(server);
  return server;
}

describe("a server asked for its pre-shared key", () => {
  /** Has a certificate that the client's machine trusts, and the key if it is the right one. */
  async function serverWithBoth(key: string | null) {
    const pki = await makeCertificates();
    const server = await startScript({
      data: Buffer.alloc(MiB),
      tls: {
        cert: readFileSync(join(pki, "server-cert.pem")),
        key: readFileSync(join(pki, "server-key.pem")),
        pskCallback: () => (key === null ? null : Buffer.from(key, "hex")),
      } as ScriptOptions["tls"] & object,
    });
    const keys = join(scratchFolder(), "keys.psk");
    writeFileSync(keys, `alice:${"5c".repeat(32)}\n`);
    const uri = `nbds+unix://alice@/disk?socket=${server.socketPath}`;
    const info = (parameters: string) =>
      cowcatcher(["info", `${uri}&${parameters}`], {
        env: { NODE_EXTRA_CA_CERTS: join(pki, "ca-cert.pem") },
      });
    return { info, psk: `tls-psk-file=${keys}`, certificates: `tls-certificates=${pki}` };
  }

  it("is not believed for a certificate, however good", async () => {
    const { info, psk, certificates } = await serverWithBoth(null);
    const refused = await info(psk);
    expect(refused.code).toBe(1);
    expect(refused.stderr).toContain("the server shows a certificate instead of knowing the key");
    // The certificate itself is good.
    expect(await info(certificates)).toMatchObject({ code: 0 });
  });

  it("is believed when it knows the key, beside its certificate", async () => {
    const { info, psk } = await serverWithBoth("5c".repeat(32));
    expect(await info(psk)).toMatchObject({ code: 0, stderr: "" });
  });

  it("is not believed with another key", async () => {
    const { info, psk } = await serverWithBoth("5d".repeat(32));
    const refused = await info(psk);
    expect(refused.code).toBe(1);
    expect(refused.stderr).toContain("no TLS");
  });
});

describe("a target that refuses one chunk and is silent on the others", () => {
  it("ends the backup at once", async () => {
    const server = await startScript({
      data: Buffer.alloc(24 * MiB),
      onRequest: ({ command, offset }) => {
        if (command !== NBD_CMD_WRITE) return "answer";
        return Math.floor(offset / MiB) === 5 ? NBD_EIO : "silence";
      },
    });
    const start = performance.now();
    const args = ["backup", "-q", "--target-retries", "0", file(diskBytes(24 * MiB)), server.uri];
    const { code, stderr } = await cowcatcher(args);
    expect(code).toBe(1);
    expect(stderr).toContain("cannot write: input/output error");
    // An answer is awaited for two minutes.
    expect(performance.now() - start).toBeLessThan(60_000);
  });
});

describe("a target whose server comes back without what it had acknowledged", () => {
  it("fails the backup, by name", async () => {
    const bytes = diskBytes(24 * MiB);
    const target = await nbdkit("memory", "24M");
    const args = ["--json", "-p", "--rate-limit", "3M", "--target-retries", "20"];
    const backup = startBackup(["backup", ...args, file(bytes), target.uri]);
    await hasBegun(backup);
    target.process.kill("SIGKILL");
    await target.process.ended;
    rmSync(target.socket, { force: true });
    await startServer("nbdkit", (socket) => ["-f", "-U", socket, "memory", "24M"], { socket: target.socket });
    const { code, stdout, stderr } = await backup.ended;
    expect(stdout + stderr).toContain("the server does not have what it had acknowledged and not flushed");
    expect(code).toBe(EXIT.verifyDifference);
  });
});
