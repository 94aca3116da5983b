// NBD URIs: which server and which export one names, and how the way there is secured.
//
// Specification: doc/uri.md of NetworkBlockDevice/nbd; the tls-… parameters are libnbd's (nbd_connect_uri(3)).
// nbd: and nbd+unix: never use TLS and nbds: and nbds+unix: always do: nothing is opportunistic. A parameter that
// is not known is refused, since one that is misspelt would be one that does not protect.
//
// An export's name is free text, no path: "x/../a" and "x//a" are names of their own, however they are encoded. So the
// parts are taken from the URI's raw text and percent-decoded once. Parsers for the web resolve dot segments, drop tabs
// and line feeds, and know no empty host, and so lead to another export than the one that was named.

import { isIPv6 } from "node:net";
import { CowcatcherError } from "../../errors.js";
import { MAX_STRING_BYTES } from "./protocol.js";

/** The port that IANA has assigned to NBD. */
export const NBD_DEFAULT_PORT = 10_809;
const MAX_PORT = 65_535;

/** What an nbds URI says of TLS. */
export interface NbdTls {
  /** Folder of ca-cert.pem and, for a client certificate, client-cert.pem and client-key.pem. */
  certificates?: string | undefined;
  /** File of lines USERNAME:HEXKEY; pre-shared keys instead of certificates. */
  pskFile?: string | undefined;
  /** Which line of `pskFile`. */
  username?: string | undefined;
  /** The name that the server's certificate must have, if not the host's. */
  hostname?: string | undefined;
  /** False: any certificate will do. */
  verifyPeer: boolean;
}

interface ExportAddress {
  /** The empty name is the server's default export. */
  exportName: string;
  /** Undefined: no TLS. */
  tls?: NbdTls | undefined;
}

/** A server's socket and one of its exports. */
export type NbdAddress = ExportAddress & ({ path: string } | { host: string; port: number });

const NBD_URI = /^nbds?(?:\+tcp|\+unix|\+vsock)?:\/\//i;
const TLS_PARAMETERS = new Set(["tls-certificates", "tls-psk-file", "tls-hostname", "tls-verify-peer"]);

/** Whether a SOURCE or TARGET is meant as an NBD URI (which may be a wrong one) and not as a path. */
export function isNbdUri(text: string): boolean {
  return NBD_URI.test(text);
}

/**
 * @throws CowcatcherError USAGE for a text that is no NBD URI, UNSUPPORTED for vsock.
 */
export function parseNbdUri(text: string): NbdAddress {
  const parts = splitUri(text);
  if (parts.transport === "vsock") {
    throw unsupported(text, "vsock is not supported", "use nbd:// or nbd+unix://");
  }
  const exportName = decode(text, parts.path.slice(1));
  if (exportName.includes("\0")) throw uriError(text, "has a zero byte in the export's name");
  if (Buffer.byteLength(exportName) > MAX_STRING_BYTES) {
    throw uriError(text, `the export's name is longer than ${MAX_STRING_BYTES} bytes`);
  }
  const parameters = queryParameters(text, parts.query);
  const tls = parts.isSecure ? tlsOf(text, decode(text, parts.user), parameters) : undefined;
  if (tls === undefined) refuseTlsParameters(text, parameters);
  const place =
    parts.transport === "unix" ? unixPlace(text, parts, parameters) : tcpPlace(text, parts, parameters);
  return { ...place, exportName, ...(tls !== undefined && { tls }) };
}

/** Whether the text is an export's name of the form that QEMU had before URIs: nbd:unix:PATH, nbd:HOST:PORT. */
export function isOldNbdName(text: string): boolean {
  return /^nbd:(?!\/\/)/.test(text);
}

/**
 * nbd:unix:PATH[:exportname=NAME] or nbd:HOST:PORT[:exportname=NAME], as QEMU takes them (block/nbd.c,
 * nbd_parse_filename). Nothing in it is percent-encoded.
 * @throws CowcatcherError USAGE
 */
export function parseOldNbdName(text: string): NbdAddress {
  const [place = "", ...exports] = text.slice("nbd:".length).split(":exportname=");
  const exportName = exports.join(":exportname=");
  const hint = "write nbd:unix:PATH:exportname=NAME or nbd:HOST:PORT:exportname=NAME";
  if (exports.length > 0 && exportName === "") throw uriError(text, "names no export", hint);
  if (place.startsWith("unix:")) {
    const path = place.slice("unix:".length);
    if (path === "") throw uriError(text, "names no path", hint);
    return { path, exportName };
  }
  const found = /^(?:\[([^\]]*)\]|([^:]*)):(\d+)$/.exec(place);
  if (found === null) throw uriError(text, "names no server's address", hint);
  const host = found[1] ?? found[2] ?? "";
  // It becomes part of a URI: nothing in it may end the host there.
  const isHost = /^[\w.-]+$/.test(host) || isIPv6(host);
  if (!isHost) throw uriError(text, `has the host '${host}', which is none`);
  const port = Number(found[3]);
  if (port < 1 || port > MAX_PORT)
    throw uriError(text, `has the port '${found[3]}'`, "write a number of 1 to 65535");
  return { host, port, exportName };
}

/** The parts of a URI as they stand in it, still percent-encoded. */
interface UriParts {
  isSecure: boolean;
  transport: "tcp" | "unix" | "vsock";
  user: string;
  host: string;
  port: string;
  /** Empty, or with the slash that it begins with. */
  path: string;
  query: string;
}

/** RFC 3986, appendix B, for a URI that has an authority, which may be empty. */
const URI_PARTS = /^nbd(s?)(?:\+(tcp|unix|vsock))?:\/\/([^/?#]*)([^?#]*)(?:\?([^#]*))?(#.*)?$/is;
const AUTHORITY = /^(?:(.*)@)?(\[[^\]]*\]|[^:[\]]*)(?::(\d*))?$/s;

function splitUri(text: string): UriParts {
  const [, secure = "", transport = "tcp", authority = "", path = "", query = "", fragment] =
    URI_PARTS.exec(text) ?? [];
  const [whole, user = "", host = "", port = ""] = AUTHORITY.exec(authority) ?? [];
  if (!isNbdUri(text) || whole === undefined) {
    throw uriError(
      text,
      "is not an NBD URI",
      "write nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH",
    );
  }
  // It would end the export's name unseen.
  if (fragment !== undefined) throw uriError(text, "has a '#', which NBD URIs do not use", "write it as %23");
  return {
    isSecure: secure !== "",
    transport: transport.toLowerCase() as UriParts["transport"],
    user,
    host,
    port,
    path,
    query,
  };
}

/** How errors and logs call an address: its URI. */
export function formatNbdUri(address: NbdAddress): string {
  const { exportName, tls } = address;
  const name = encode(exportName);
  const scheme = tls === undefined ? "nbd" : "nbds";
  const user = tls?.username === undefined ? "" : `${encodeURIComponent(tls.username)}@`;
  const parameters = "path" in address ? [`socket=${encode(address.path)}`] : [];
  if (tls?.certificates !== undefined) parameters.push(`tls-certificates=${encode(tls.certificates)}`);
  if (tls?.pskFile !== undefined) parameters.push(`tls-psk-file=${encode(tls.pskFile)}`);
  if (tls?.hostname !== undefined) parameters.push(`tls-hostname=${encode(tls.hostname)}`);
  if (tls?.verifyPeer === false) parameters.push("tls-verify-peer=0");
  const query = parameters.length === 0 ? "" : `?${parameters.join("&")}`;
  if ("path" in address) return `${scheme}+unix://${user}/${name}${query}`;
  // A zone, as in fe80::1%eth0, has a percent sign of its own.
  const host = address.host.includes(":")
    ? `[${address.host.replaceAll("%", "%25")}]`
    : encodeURIComponent(address.host);
  const port = address.port === NBD_DEFAULT_PORT ? "" : `:${address.port}`;
  return `${scheme}://${user}${host}${port}/${name}${query}`;
}

function encode(text: string): string {
  return encodeURIComponent(text).replaceAll("%2F", "/");
}

/** URLSearchParams would turn a "+" in a path into a space: that is a form's rule, not a URI's. */
function queryParameters(text: string, query: string): Map<string, string> {
  const parameters = new Map<string, string>();
  for (const parameter of query.split("&")) {
    if (parameter === "") continue;
    const at = parameter.indexOf("=");
    const key = decode(text, at < 0 ? parameter : parameter.slice(0, at));
    if (key !== "socket" && !TLS_PARAMETERS.has(key)) {
      const known = ["socket", ...TLS_PARAMETERS].join(", ");
      throw uriError(text, `has the unknown parameter '${key}'`, `there are ${known}`);
    }
    if (parameters.has(key)) throw uriError(text, `gives '${key}' twice`);
    parameters.set(key, at < 0 ? "" : decode(text, parameter.slice(at + 1)));
  }
  return parameters;
}

function refuseTlsParameters(text: string, parameters: ReadonlyMap<string, string>): void {
  for (const key of parameters.keys()) {
    if (TLS_PARAMETERS.has(key)) throw uriError(text, `'${key}' needs TLS`, "write nbds: instead of nbd:");
  }
}

function tlsOf(text: string, username: string, parameters: ReadonlyMap<string, string>): NbdTls {
  const verify = parameters.get("tls-verify-peer") ?? "1";
  if (!/^(0|1|true|false)$/.test(verify)) {
    throw uriError(text, `'tls-verify-peer=${verify}' is neither 0 nor 1`);
  }
  const [certificates, pskFile] = [parameters.get("tls-certificates"), parameters.get("tls-psk-file")];
  if (certificates !== undefined && pskFile !== undefined) {
    throw uriError(text, "gives both 'tls-certificates' and 'tls-psk-file'", "leave one out");
  }
  return {
    certificates,
    pskFile,
    username: username === "" ? undefined : username,
    hostname: parameters.get("tls-hostname"),
    verifyPeer: verify === "1" || verify === "true",
  };
}

function tcpPlace(
  text: string,
  { host: rawHost, port: rawPort }: UriParts,
  parameters: ReadonlyMap<string, string>,
): { host: string; port: number } {
  if (parameters.has("socket")) {
    throw uriError(text, "names a host and a Unix socket", "write nbd+unix:///EXPORT?socket=PATH");
  }
  // The specification leaves it to the client; libnbd's take it for this machine.
  const host = rawHost === "" ? "localhost" : checkedHost(text, decode(text, rawHost));
  const port = rawPort === "" ? NBD_DEFAULT_PORT : Number(rawPort);
  if (port > MAX_PORT) throw uriError(text, `has the port ${rawPort}`, `the largest is ${MAX_PORT}`);
  return { host, port };
}

/** Without the brackets of a literal address. */
function checkedHost(text: string, host: string): string {
  const literal = /^\[(.*)\]$/s.exec(host)?.[1];
  if (literal !== undefined && isIPv6(literal)) return literal;
  if (literal === undefined && !/[\s\p{C}/?#@:[\]<>\\^|%]/u.test(host)) return host;
  throw uriError(text, `has the host '${host}', which is none`);
}

function unixPlace(
  text: string,
  { host, port }: UriParts,
  parameters: ReadonlyMap<string, string>,
): { path: string } {
  if (host !== "" || port !== "") {
    throw uriError(
      text,
      "names a host and a Unix socket",
      "write three slashes: nbd+unix:///EXPORT?socket=PATH",
    );
  }
  const path = parameters.get("socket");
  if (path === undefined || path === "") throw uriError(text, "names no socket", "add ?socket=PATH");
  return { path };
}

function decode(uri: string, part: string): string {
  try {
    return decodeURIComponent(part);
  } catch {
    throw uriError(uri, `has a wrong percent-encoding in '${part}'`);
  }
}

function uriError(object: string, problem: string, hint?: string): CowcatcherError {
  return new CowcatcherError({ code: "USAGE", object, problem, hint });
}

function unsupported(object: string, problem: string, hint: string): CowcatcherError {
  return new CowcatcherError({ code: "UNSUPPORTED", object, problem, hint });
}
