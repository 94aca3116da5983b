// NBD URIs: which server and which export one names. Specification: doc/uri.md of NetworkBlockDevice/nbd.

import { CowcatcherError } from "../errors.js";
import { MAX_STRING_BYTES } from "./protocol.js";

/** The port that IANA has assigned to NBD. */
export const NBD_DEFAULT_PORT = 10_809;

/** A server's socket and the name of one of its exports; the empty name is the server's default export. */
export type NbdAddress =
  { path: string; exportName: string } | { host: string; port: number; exportName: string };

/**
 * @throws CowcatcherError USAGE for a text that is no NBD URI, UNSUPPORTED for TLS (nbds) and for vsock.
 */
export function parseNbdUri(text: string): NbdAddress {
  const uri = URL.canParse(text) ? new URL(text) : undefined;
  const scheme = uri?.protocol;
  if (uri === undefined || scheme === undefined || !/^nbds?(\+unix|\+vsock)?:$/.test(scheme)) {
    throw uriError(
      text,
      "is not an NBD URI",
      "write nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH",
    );
  }
  if (scheme.startsWith("nbds")) {
    throw unsupported(
      text,
      "TLS is not supported in this version",
      "use nbd:// or nbd+unix:// on a safe network",
    );
  }
  if (scheme === "nbd+vsock:") throw unsupported(text, "vsock is not supported", "use nbd:// or nbd+unix://");
  const exportName = decode(text, uri.pathname.replace(/^\//, ""));
  if (Buffer.byteLength(exportName) > MAX_STRING_BYTES) {
    throw uriError(text, `the export's name is longer than ${MAX_STRING_BYTES} bytes`);
  }
  return scheme === "nbd:" ? tcpAddress(text, uri, exportName) : unixAddress(text, uri, exportName);
}

/** How errors and logs call an address: its URI. */
export function formatNbdUri(address: NbdAddress): string {
  const name = encodeURIComponent(address.exportName).replaceAll("%2F", "/");
  if ("path" in address) {
    return `nbd+unix:///${name}?socket=${encodeURIComponent(address.path).replaceAll("%2F", "/")}`;
  }
  const host = address.host.includes(":") ? `[${address.host}]` : address.host;
  return `nbd://${host}${address.port === NBD_DEFAULT_PORT ? "" : `:${address.port}`}/${name}`;
}

function tcpAddress(text: string, uri: URL, exportName: string): NbdAddress {
  const host = decode(text, uri.hostname.replace(/^\[(.*)\]$/, "$1"));
  if (host === "") throw uriError(text, "names no host", "write nbd://HOST[:PORT]/EXPORT");
  return { host, port: uri.port === "" ? NBD_DEFAULT_PORT : Number(uri.port), exportName };
}

function unixAddress(text: string, uri: URL, exportName: string): NbdAddress {
  if (uri.host !== "") {
    throw uriError(
      text,
      "names a host and a Unix socket",
      "write three slashes: nbd+unix:///EXPORT?socket=PATH",
    );
  }
  // URLSearchParams would turn a "+" in a path into a space: that is a form's rule, not a URI's.
  const parameters = uri.search.slice(1).split("&");
  const socket = parameters.find((parameter) => parameter.startsWith("socket="))?.slice("socket=".length);
  if (socket === undefined || socket === "") throw uriError(text, "names no socket", "add ?socket=PATH");
  return { path: decode(text, socket), exportName };
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
