import * as dns from "node:dns";
import { mkdtempSync, rmSync, symlinkSync } from "node:fs";
import { createServer, type Server } from "node:net";
import { networkInterfaces, tmpdir } from "node:os";
import { join, relative } from "node:path";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { haveCommon, listenerKeys, resolveExport, sameExport } from "../../../../src/nbd/wire/place.js";
import { parseNbdUri } from "../../../../src/nbd/wire/uri.js";

/** The resolver, which a test must not depend on. */
const lookup = ((host: string) => {
  const addresses = host === "localhost" ? ["127.0.0.1", "::1"] : [];
  if (addresses.length > 0) return Promise.resolve(addresses.map((address) => ({ address })));
  return Promise.reject(Object.assign(new Error("ENOTFOUND"), { code: "ENOTFOUND" }));
}) as unknown as typeof dns.promises.lookup;
beforeEach(() => void vi.spyOn(dns.promises, "lookup").mockImplementation(lookup));

async function compare(a: string, b: string): Promise<string> {
  return sameExport(await resolveExport(parseNbdUri(a)), await resolveExport(parseNbdUri(b)));
}

describe("two TCP addresses", () => {
  it.each([
    ["nbd://127.0.0.1/a", "nbd://127.0.0.1:10809/a"],
    ["nbd://localhost/a", "nbd://127.0.0.1/a"],
    ["nbd://LOCALHOST/a", "nbds://localhost/a"],
    ["nbd://[::1]/a", "nbd://[0:0:0:0:0:0:0:1]/a"],
    ["nbd://[::ffff:127.0.0.1]/a", "nbd://127.0.0.1/a"],
    ["nbd://[::ffff:10.1.2.254]/a", "nbd://10.1.2.254/a"],
    ["nbd://0.0.0.0/a", "nbd://127.8.9.10/a"],
    ["nbd://no-such-host.invalid/%61", "nbd://no-such-host.invalid/a"],
  ])("%s and %s are one export", async (a, b) => {
    expect(await compare(a, b)).toBe("yes");
    expect(await compare(b, a)).toBe("yes");
  });

  it.each([
    ["nbd://127.0.0.1/a", "nbd://127.0.0.1/b"],
    ["nbd://127.0.0.1/a", "nbd://127.0.0.1:10810/a"],
    ["nbd://127.0.0.1/a", "nbd://10.0.0.1/a"],
    ["nbd://127.0.0.1/a", "nbd://[::1]/a"],
    ["nbd://127.0.0.1/", "nbd://127.0.0.1:1/a"],
    ["nbd://no-such-host.invalid/a", "nbd://no-other-host.invalid/a"],
  ])("%s and %s are two", async (a, b) => {
    expect(await compare(a, b)).toBe("no");
  });

  it("may be one where one of them names the default export", async () => {
    expect(await compare("nbd://127.0.0.1/", "nbd://127.0.0.1/a")).toBe("perhaps");
    expect(await compare("nbd://127.0.0.1/a", "nbd://127.0.0.1")).toBe("perhaps");
    expect(await compare("nbd://127.0.0.1/", "nbd://127.0.0.1")).toBe("yes");
  });
});

describe("a listener", () => {
  const reaches = async (host: string, uri: string): Promise<boolean> => {
    const { keys } = await resolveExport(parseNbdUri(uri));
    return haveCommon(keys, await listenerKeys({ host, port: 10_809 }));
  };

  it("on all addresses is reached by each of them", async () => {
    const own = Object.values(networkInterfaces()).flatMap((entries) => entries ?? []);
    for (const { address, family } of own) {
      const uri = family === "IPv6" ? `nbd://[${address.replace(/%.*/, "")}]/a` : `nbd://${address}/a`;
      expect(await reaches("::", uri), uri).toBe(true);
      expect(await reaches("0.0.0.0", uri), uri).toBe(family === "IPv4");
    }
    expect(await reaches("0.0.0.0", "nbd://127.0.0.7/a")).toBe(true);
    expect(await reaches("0.0.0.0", "nbd://192.0.2.1/a")).toBe(false);
    expect(await reaches("0.0.0.0", "nbd://127.0.0.1:10810/a")).toBe(false);
  });

  it("on one address is reached by that", async () => {
    expect(await reaches("::1", "nbd://[::1]/a")).toBe(true);
    expect(await reaches("192.0.2.1", "nbd://192.0.2.1/a")).toBe(true);
    expect(await reaches("192.0.2.1", "nbd://127.0.0.1/a")).toBe(false);
  });
});

describe("a Unix socket", () => {
  let folder: string;
  let server: Server;
  beforeEach(async () => {
    folder = mkdtempSync(join(tmpdir(), "cowcatcher-place-"));
    server = createServer();
    await new Promise<void>((resolve) => server.listen(join(folder, "s"), resolve));
  });
  afterEach(() => {
    server.close();
    rmSync(folder, { recursive: true });
  });

  it("is the same by any path", async () => {
    const uri = (path: string): string => `nbd+unix:///a?socket=${path}`;
    symlinkSync(join(folder, "s"), join(folder, "link"));
    const real = uri(join(folder, "s"));
    expect(await compare(real, uri(join(folder, "link")))).toBe("yes");
    expect(await compare(real, uri(relative(process.cwd(), join(folder, "s"))))).toBe("yes");
    expect(await compare(real, uri(join(folder, "none")))).toBe("no");
    expect(await compare(uri(join(folder, "none")), uri(`${folder}/./none`))).toBe("yes");
    const { keys } = await resolveExport(parseNbdUri(uri(join(folder, "link"))));
    expect(haveCommon(keys, await listenerKeys({ path: join(folder, "s") }))).toBe(true);
  });
});
