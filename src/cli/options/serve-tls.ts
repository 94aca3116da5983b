// The --tls… options of `serve`, in nbdkit's words.

import { Option, type Command } from "commander";
import type { TlsSettings } from "../../nbd/server/tls.js";
import { parseChoice, pathOption, usageError } from "./options.js";

export interface TlsFlags {
  tls?: "off" | "require";
  tlsCertificates?: string;
  tlsVerifyPeer?: boolean;
  tlsPsk?: string;
}

export function addTlsOptions(command: Command): Command {
  return command
    .addOption(
      new Option(
        "--tls <MODE>",
        "off or require (require with --tls-certificates or --tls-psk, else off)",
      ).argParser(parseMode),
    )
    .addOption(
      pathOption("--tls-certificates <DIR>", "folder of server-cert.pem, server-key.pem and ca-cert.pem"),
    )
    .option("--tls-verify-peer", "accept only clients whose certificate ca-cert.pem has signed")
    .addOption(
      pathOption("--tls-psk <FILE>", "pre-shared keys: lines of USERNAME:HEXKEY, as psktool makes them"),
    );
}

/** nbdkit and nbd-server know a third mode, in which the client, or whoever sits on the wire, decides. */
function parseMode(text: string): "off" | "require" {
  if (text === "on") {
    throw usageError("--tls", "'on' would leave it to the client whether to encrypt", "give require or off");
  }
  return parseChoice(text, "--tls", ["off", "require"] as const);
}

/** Undefined: TLS is off. @throws CowcatcherError USAGE for a combination that cannot mean anything. */
export function parseTls({ tls, tlsCertificates, tlsVerifyPeer, tlsPsk }: TlsFlags): TlsSettings | undefined {
  const source = tlsCertificates === undefined ? "--tls-psk" : "--tls-certificates";
  const hasSource = tlsCertificates !== undefined || tlsPsk !== undefined;
  if (tls === "off" && hasSource) throw usageError(source, "does not go with --tls off");
  if (tlsCertificates !== undefined && tlsPsk !== undefined) {
    throw usageError(
      "--tls-psk",
      "does not go with --tls-certificates",
      "clients are known by one or the other",
    );
  }
  if (tlsVerifyPeer === true && tlsCertificates === undefined) {
    throw usageError(
      "--tls-verify-peer",
      "needs --tls-certificates",
      "it checks clients by ca-cert.pem there",
    );
  }
  if (tlsCertificates !== undefined) {
    return { kind: "certificates", folder: tlsCertificates, verifyPeer: tlsVerifyPeer ?? false };
  }
  if (tlsPsk !== undefined) return { kind: "psk", file: tlsPsk };
  if (tls === "require") {
    throw usageError(
      "--tls",
      "has nothing to identify the server by",
      "give --tls-certificates DIR or --tls-psk FILE",
    );
  }
  return undefined;
}
