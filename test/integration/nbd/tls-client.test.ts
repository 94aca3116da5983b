// The way to a server through TLS.
import { randomBytes } from "node:crypto";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, describe, expect, it } from "vitest";
import {
  disk,
  fails,
  file,
  makeCertificates,
  nbdkit,
  startServer,
  succeeds,
} from "../../support/nbd-servers.js";
import { scratchFolder, stopAll } from "../../support/server.js";

afterEach(stopAll);

describe("TLS", () => {
  it("goes by certificates, and checks them", async () => {
    const pki = await makeCertificates();
    const args = (socket: string) => [
      ...[
        "-f",
        "-U",
        socket,
        "--tls=require",
        `--tls-certificates=${pki}`,
        "--tls-verify-peer",
        "memory",
        "6M",
      ],
    ];
    const extra = `&tls-certificates=${pki}`;
    const server = await startServer("nbdkit", args, { scheme: "nbds+unix://", extra });
    await succeeds(["backup", "-q", "--verify", file(disk), server.uri]);
    expect(await succeeds(["compare", file(disk), server.uri])).toBe("Images are identical.\n");
    expect(await fails(["info", `${server.uri}&tls-hostname=elsewhere`])).toContain(
      "does not match certificate",
    );
    await succeeds(["info", `${server.uri}&tls-hostname=elsewhere&tls-verify-peer=0`]);
    expect(await fails(["info", server.uri.replace("nbds", "nbd").replace(extra, "")])).toContain(
      "wants TLS",
    );
    const stranger = await makeCertificates();
    expect(await fails(["info", server.uri.replace(pki, stranger)])).toContain("no TLS");
    const plain = await nbdkit("memory", "1M");
    expect(await fails(["info", `${plain.uri.replace("nbd+", "nbds+")}${extra}`])).toContain("has no TLS");
  });

  it("goes by pre-shared keys", async () => {
    const keys = join(scratchFolder(), "keys.psk");
    writeFileSync(keys, `bob:00ff\nalice:${randomBytes(32).toString("hex")}\n`);
    const args = (socket: string) => [
      "-f",
      "-U",
      socket,
      "--tls=require",
      `--tls-psk=${keys}`,
      "memory",
      "6M",
    ];
    const extra = `&tls-psk-file=${keys}`;
    const server = await startServer("nbdkit", args, { scheme: "nbds+unix://alice@", extra });
    await succeeds(["backup", "-q", "--verify", file(disk), server.uri]);
    const other = join(scratchFolder(), "other.psk");
    writeFileSync(other, `alice:${randomBytes(32).toString("hex")}\n`);
    expect(await fails(["info", server.uri.replace(keys, other)])).toContain("no TLS");
    expect(await fails(["info", server.uri.replace("alice", "carol")], 2)).toContain("no key for 'carol'");
  });
});
