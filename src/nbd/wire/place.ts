// Whether two NBD addresses lead to one server, and to one of its exports.
//
// A place is turned into keys first, which takes a look into the file system or a question to the resolver; two places
// are one where they have a key in common, and that is asked without waiting. A Unix socket is its inode, by whatever
// path; a TCP address is every address that its host's name has, with the port. TLS is how one gets there, not where.
// What is not seen: a way through another machine, a port that is forwarded, a proxy.

import * as dns from "node:dns";
import * as fs from "node:fs";
import { isIP } from "node:net";
import { networkInterfaces } from "node:os";
import { absoluteName } from "../../file-names.js";
import type { NbdAddress } from "./uri.js";

/** Where a server listens. */
export type NbdPlace = { path: string } | { host: string; port: number };

export interface ResolvedExport {
  readonly keys: ReadonlySet<string>;
  readonly exportName: string;
}

/** Never rejects: a name that cannot be resolved is one place with itself. */
export async function resolveExport(address: NbdAddress): Promise<ResolvedExport> {
  const keys = "path" in address ? await socketKeys(address.path) : await clientKeys(address);
  return { keys, exportName: address.exportName };
}

/** All addresses under which a listener of this machine is reached from it. */
export async function listenerKeys(place: NbdPlace): Promise<ReadonlySet<string>> {
  if ("path" in place) return socketKeys(place.path);
  const { host, port } = place;
  if (host !== "0.0.0.0" && host !== "::") return new Set([tcpKey(host, port)]);
  const own = Object.values(networkInterfaces()).flatMap((entries) => entries ?? []);
  // "::" takes IPv4 as well, unless told not to.
  const reached = own
    .filter(({ family }) => host === "::" || family === "IPv4")
    .map(({ address }) => address);
  const loopbacks = host === "::" ? ["127.0.0.1", "::1"] : ["127.0.0.1"];
  return new Set([...reached, ...loopbacks].map((address) => tcpKey(address, port)));
}

/** Whether the two sets of places share one: two addresses may then be one server. */
export function haveCommon(a: ReadonlySet<string>, b: ReadonlySet<string>): boolean {
  for (const key of a) if (b.has(key)) return true;
  return false;
}

/**
 * "perhaps": one server, and one of the two names is empty, which means its default export: that may be the other.
 */
export function sameExport(a: ResolvedExport, b: ResolvedExport): "no" | "perhaps" | "yes" {
  if (!haveCommon(a.keys, b.keys)) return "no";
  if (a.exportName === b.exportName) return "yes";
  return a.exportName === "" || b.exportName === "" ? "perhaps" : "no";
}

async function socketKeys(socketPath: string): Promise<ReadonlySet<string>> {
  const keys = new Set([`unix ${absoluteName(socketPath)}`]);
  const stats = await fs.promises.stat(socketPath, { bigint: true }).catch(() => null);
  if (stats !== null) keys.add(`inode ${stats.dev}:${stats.ino}`);
  return keys;
}

async function clientKeys({ host, port }: { host: string; port: number }): Promise<ReadonlySet<string>> {
  const name = host.toLowerCase();
  if (isIP(name) !== 0) return new Set([tcpKey(name, port)]);
  const found = await dns.promises.lookup(name, { all: true }).catch(() => []);
  return new Set([tcpKey(name, port), ...found.map(({ address }) => tcpKey(address, port))]);
}

function tcpKey(host: string, port: number): string {
  return `tcp ${canonicalHost(host)} ${port}`;
}

/**
 * One spelling an address. An unspecified one is this machine for a client; all of 127.0.0.0/8 is taken for one, as a
 * listener at 0.0.0.0 is reached by any of it.
 */
function canonicalHost(host: string): string {
  const plain = host.toLowerCase().replace(/%.*$/, "");
  // URL has the canonical form of IPv6, and that of a mapped IPv4 address in hexadecimal.
  const canonical = isIP(plain) === 6 ? new URL(`nbd://[${plain}]`).hostname.slice(1, -1) : plain;
  const mapped = /^::ffff:([0-9a-f]{1,4}):([0-9a-f]{1,4})$/.exec(canonical);
  const address = mapped === null ? canonical : dottedOf(mapped[1] ?? "", mapped[2] ?? "");
  if (address === "0.0.0.0" || /^127\.\d+\.\d+\.\d+$/.test(address)) return "127.0.0.1";
  return address === "::" ? "::1" : address;
}

function dottedOf(highWord: string, lowWord: string): string {
  return [highWord, lowWord]
    .map((word) => parseInt(word, 16))
    .map((word) => `${word >> 8}.${word & 0xff}`)
    .join(".");
}
