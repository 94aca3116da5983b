// TLS for the client, after STARTTLS: where the certificates or keys are found, and the handshake.
//
// As libnbd has it: X.509 from a folder of ca-cert.pem and perhaps client-cert.pem and client-key.pem, by default
// ~/.pki/libnbd, ~/.config/pki/libnbd or /etc/pki/libnbd, whichever has a ca-cert.pem first; without one the
// authorities that Node trusts. Or pre-shared keys from a file of lines USERNAME:HEXKEY. A key file makes no use of
// certificates and the other way round. Nothing is tried twice with less.

import { existsSync, readFileSync } from "node:fs";
import { isIP, type Socket } from "node:net";
import { homedir, userInfo } from "node:os";
import { join } from "node:path";
import { connect, type ConnectionOptions, type TLSSocket } from "node:tls";
import { CowcatcherError, ioError, messageOf } from "../../errors.js";
import type { NbdAddress, NbdTls } from "../wire/uri.js";

const CA_FILE = "ca-cert.pem";
const CERTIFICATE_FILE = "client-cert.pem";
const KEY_FILE = "client-key.pem";
/** A key file has a line a user; one of this size is something else. */
const MAX_PSK_FILE_BYTES = 1024 * 1024;
/**
 * Without certificates; DHE and ECDHE keep old sessions secret if a key leaks. In TLS 1.3 such a key goes with SHA-256
 * alone (RFC 8446, 4.2.11): a server that has a certificate besides would choose SHA-384 and show that instead.
 */
const PSK_CIPHERS =
  "TLS_CHACHA20_POLY1305_SHA256:TLS_AES_128_GCM_SHA256:ECDHE-PSK-CHACHA20-POLY1305:" +
  "DHE-PSK-AES256-GCM-SHA384:DHE-PSK-AES128-GCM-SHA256:ECDHE-PSK-AES256-CBC-SHA384:PSK-AES256-GCM-SHA384";

/**
 * Makes a TLS connection of a socket whose server has agreed to STARTTLS.
 * @throws CowcatcherError NOT_FOUND or IO for the files, USAGE for what is in them, IO for a failed handshake
 *   (errno EPROTO) or a certificate that is not the one wanted (errno EACCES).
 */
export async function secure(
  socket: Socket,
  object: string,
  address: NbdAddress,
  tls: NbdTls,
): Promise<TLSSocket> {
  const host = tls.hostname ?? ("host" in address ? address.host : "localhost");
  const options: ConnectionOptions = {
    socket,
    host,
    minVersion: "TLSv1.2",
    ...(isIP(host) === 0 && { servername: host }),
    ...(tls.pskFile === undefined ? certificateOptions(tls) : pskOptions(tls.pskFile, tls.username)),
  };
  return handshake(options, object);
}

function handshake(options: ConnectionOptions, object: string): Promise<TLSSocket> {
  return new Promise((resolve, reject) => {
    const failed = (problem: string, errno: string, cause?: unknown): void =>
      reject(new CowcatcherError({ code: "IO", object, problem, errno, cause }));
    let secured: TLSSocket;
    try {
      secured = connect(options, () => resolve(secured));
    } catch (error) {
      // A certificate or key that OpenSSL cannot read.
      failed(`the certificates cannot be used: ${messageOf(error)}`, "EINVAL", error);
      return;
    }
    secured.once("error", (error: Error) =>
      failed(`no TLS: ${oneLine(messageOf(error))}`, errnoOf(error), error),
    );
    secured.once("close", () => failed("the connection ended during the TLS handshake", "ECONNRESET"));
  });
}

function oneLine(text: string): string {
  return text.replace(/\p{C}+/gu, " ").trim();
}

/** A peer that is not who it should be is not a matter of trying again. */
function errnoOf(error: Error & { code?: string }): string {
  return /^(ERR_TLS_CERT|CERT_|SELF_SIGNED|DEPTH_ZERO|UNABLE_TO)/.test(error.code ?? "")
    ? "EACCES"
    : "EPROTO";
}

function certificateOptions({ certificates, verifyPeer }: NbdTls): ConnectionOptions {
  const folder = certificates ?? defaultFolders().find((path) => existsSync(join(path, CA_FILE)));
  if (folder === undefined) return { rejectUnauthorized: verifyPeer };
  const [certificate, key] = [join(folder, CERTIFICATE_FILE), join(folder, KEY_FILE)];
  const hasClient = existsSync(certificate) || existsSync(key);
  return {
    rejectUnauthorized: verifyPeer,
    ca: readFile(join(folder, CA_FILE)),
    ...(hasClient && { cert: readFile(certificate), key: readFile(key) }),
  };
}

function defaultFolders(): string[] {
  const home = process.env["HOME"] ?? homedir();
  return [join(home, ".pki/libnbd"), join(home, ".config/pki/libnbd"), "/etc/pki/libnbd"];
}

function pskOptions(path: string, username: string | undefined): ConnectionOptions {
  const identity = username ?? userInfo().username;
  const psk = keyOf(path, identity);
  return {
    ciphers: PSK_CIPHERS,
    pskCallback: () => ({ psk, identity }),
    // That the server knows the key is what identifies it. TLS 1.3 would let it show any certificate instead.
    checkServerIdentity: (_host, certificate) =>
      Object.keys(certificate).length === 0
        ? undefined
        : Object.assign(new Error("the server shows a certificate instead of knowing the key"), {
            code: "ERR_TLS_CERT_INSTEAD_OF_KEY",
          }),
  };
}

function keyOf(path: string, identity: string): Buffer {
  const text = readFile(path);
  if (text.length > MAX_PSK_FILE_BYTES) {
    const problem = `is larger than ${MAX_PSK_FILE_BYTES} bytes`;
    throw new CowcatcherError({ code: "LIMIT", object: path, problem });
  }
  for (const line of text.toString("utf8").split("\n")) {
    const at = line.lastIndexOf(":");
    if (at < 0 || line.slice(0, at) !== identity) continue;
    const key = line.slice(at + 1).trim();
    if (key === "" || !/^([0-9a-f]{2})+$/i.test(key)) {
      throw wrongKeyFile(path, `the key of '${identity}' is not hexadecimal`, "make it with psktool");
    }
    return Buffer.from(key, "hex");
  }
  throw wrongKeyFile(path, `has no key for '${identity}'`, "name the user as nbds://USER@HOST/…");
}

function wrongKeyFile(object: string, problem: string, hint: string): CowcatcherError {
  return new CowcatcherError({ code: "USAGE", object, problem, hint });
}

function readFile(path: string): Buffer {
  try {
    return readFileSync(path);
  } catch (error) {
    throw ioError("read it for TLS", path, error);
  }
}
