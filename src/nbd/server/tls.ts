// TLS for the server, after STARTTLS: certificates or keys from files, and the handshake.
//
// The files are QEMU's and nbdkit's: a folder with server-cert.pem and server-key.pem, ca-cert.pem to check clients
// by, perhaps ca-crl.pem; or pre-shared keys, lines of USERNAME:HEXKEY as psktool writes them. They are read once,
// at the start, and tried, so that a key that does not fit its certificate is found before a guest comes.
//
// A tls.Server is made for each connection and given that one socket. It costs about a millisecond, and it is the
// documented way to have Node check a client's certificate on a socket that has spoken plain text before.
// No session is taken up again, so a client's certificate is looked at on every connection.
//
// Main thread only.

import { existsSync, readFileSync } from "node:fs";
import type { Socket } from "node:net";
import { join } from "node:path";
import { createSecureContext, createServer, type TLSSocket, type TlsOptions } from "node:tls";
import { CowcatcherError, ioError, messageOf } from "../../errors.js";

export type TlsSettings =
  /** A folder of PEM files; with verifyPeer clients must show a certificate that ca-cert.pem has signed. */
  { kind: "certificates"; folder: string; verifyPeer: boolean } | { kind: "psk"; file: string };

/** Made by loadTlsCredentials. */
export interface TlsCredentials {
  readonly options: TlsOptions;
}

/** A line a user; a file of this size is something else. */
const MAX_PSK_FILE_BYTES = 1024 * 1024;
/** OpenSSL's bound. */
const MAX_PSK_BYTES = 256;
/** TLS 1.3 suites, then those of TLS 1.2 that use pre-shared keys. None of the latter is in Node's default list. */
const PSK_CIPHERS =
  "TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256:TLS_AES_128_GCM_SHA256:" +
  "ECDHE-PSK-CHACHA20-POLY1305:DHE-PSK-AES256-GCM-SHA384:DHE-PSK-CHACHA20-POLY1305:DHE-PSK-AES128-GCM-SHA256:" +
  "ECDHE-PSK-AES256-CBC-SHA384:ECDHE-PSK-AES128-CBC-SHA256:PSK-AES256-GCM-SHA384:PSK-CHACHA20-POLY1305:" +
  "PSK-AES128-GCM-SHA256";

/** @throws CowcatcherError NOT_FOUND or IO for a file that cannot be read, USAGE for what is in it, LIMIT. */
export function loadTlsCredentials(settings: TlsSettings): TlsCredentials {
  const options = settings.kind === "psk" ? pskOptions(settings.file) : certificateOptions(settings);
  try {
    createSecureContext(options);
  } catch (error) {
    throw new CowcatcherError({
      code: "USAGE",
      object: settings.kind === "psk" ? settings.file : settings.folder,
      problem: `cannot be used for TLS: ${oneLine(messageOf(error))}`,
      hint: "server-cert.pem and server-key.pem must be PEM files that belong together",
      cause: error,
    });
  }
  return { options };
}

/**
 * Lets the client make a TLS connection of the socket, from which nothing reads any more. Exactly one of the two
 * functions is called, unless the socket is destroyed before.
 */
export function acceptTls(
  socket: Socket,
  { options }: TlsCredentials,
  onSecured: (secured: TLSSocket) => void,
  onFailed: (reason: string) => void,
): void {
  const server = createServer(options);
  server.once("secureConnection", onSecured);
  server.once("tlsClientError", (error, unsecured) => {
    const refusal: unknown = unsecured.authorizationError;
    onFailed(typeof refusal === "string" ? `client certificate: ${refusal}` : reasonOf(error));
  });
  server.emit("connection", socket);
}

function certificateOptions({ folder, verifyPeer }: { folder: string; verifyPeer: boolean }): TlsOptions {
  const revoked = join(folder, "ca-crl.pem");
  return {
    minVersion: "TLSv1.2",
    cert: readFile(join(folder, "server-cert.pem")),
    key: readFile(join(folder, "server-key.pem")),
    ...(verifyPeer && {
      ca: readFile(join(folder, "ca-cert.pem")),
      ...(existsSync(revoked) && { crl: readFile(revoked) }),
      requestCert: true,
      rejectUnauthorized: true,
    }),
  };
}

function pskOptions(path: string): TlsOptions {
  const keys = parsePskFile(path, readFile(path));
  return {
    minVersion: "TLSv1.2",
    ciphers: PSK_CIPHERS,
    dhparam: "auto",
    pskCallback: (_socket, identity) => keys.get(identity) ?? null,
  };
}

/** Keys by user name. @throws CowcatcherError USAGE, naming the line. */
export function parsePskFile(path: string, bytes: Buffer): Map<string, Buffer> {
  if (bytes.length > MAX_PSK_FILE_BYTES) {
    const problem = `is larger than ${MAX_PSK_FILE_BYTES} bytes`;
    throw new CowcatcherError({ code: "LIMIT", object: path, problem });
  }
  const keys = new Map<string, Buffer>();
  for (const [index, line] of bytes.toString("utf8").split(/\r?\n/).entries()) {
    if (line === "" || line.startsWith("#")) continue;
    const colonAt = line.lastIndexOf(":");
    const hex = line.slice(colonAt + 1).trim();
    const isKey = /^([0-9a-f]{2})+$/i.test(hex) && hex.length <= 2 * MAX_PSK_BYTES;
    if (colonAt < 1 || !isKey) {
      throw pskError(
        path,
        `line ${index + 1} is not USERNAME:HEXKEY (key of at most ${MAX_PSK_BYTES} bytes)`,
      );
    }
    keys.set(line.slice(0, colonAt), Buffer.from(hex, "hex"));
  }
  if (keys.size === 0) throw pskError(path, "holds no key");
  return keys;
}

function pskError(object: string, problem: string): CowcatcherError {
  return new CowcatcherError({
    code: "USAGE",
    object,
    problem,
    hint: "make it with psktool -u USER -p FILE",
  });
}

function readFile(path: string): Buffer {
  try {
    return readFileSync(path);
  } catch (error) {
    throw ioError("read it for TLS", path, error);
  }
}

/** OpenSSL's message is a line of codes around the reason. */
function reasonOf(error: Error & { reason?: unknown }): string {
  return oneLine(typeof error.reason === "string" ? error.reason : error.message);
}

function oneLine(text: string): string {
  return text.replace(/\p{C}+/gu, " ").trim();
}
