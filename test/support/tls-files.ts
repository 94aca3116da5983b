// Certificates and keys for TLS tests, made by openssl when they are needed.
//
//   ca/       the authority      server/   what `serve --tls-certificates` takes
//   client/   a good client      stranger/ a client that another authority has signed, with our authority's certificate
//   psk/      keys.psk
import { execFileSync } from "node:child_process";
import { copyFileSync, mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";

export interface TlsFiles {
  server: string;
  client: string;
  stranger: string;
  psk: string;
  /** The folder of `psk`, with the file name that QEMU wants. */
  pskFolder: string;
}

/** Made in no time, unlike RSA keys. */
const NEW_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"];

export const PSK_USER = "alice";

export function makeTlsFiles(folder: string): TlsFiles {
  const paths = Object.fromEntries(
    ["ca", "other-ca", "server", "client", "stranger", "psk"].map((name) => [name, join(folder, name)]),
  ) as Record<"ca" | "other-ca" | "server" | "client" | "stranger" | "psk", string>;
  for (const path of Object.values(paths)) mkdirSync(path, { recursive: true });
  makeAuthority(paths.ca);
  makeAuthority(paths["other-ca"]);
  makeCertificate(paths.ca, paths.server, "server", "serverAuth");
  makeCertificate(paths.ca, paths.client, "client", "clientAuth");
  makeCertificate(paths["other-ca"], paths.stranger, "client", "clientAuth");
  for (const path of [paths.server, paths.client, paths.stranger]) {
    copyFileSync(join(paths.ca, "ca-cert.pem"), join(path, "ca-cert.pem"));
  }
  const psk = join(paths.psk, "keys.psk");
  writeFileSync(psk, `# two users\nbob:00ff\n${PSK_USER}:${"5c".repeat(32)}\n`);
  const { server, client, stranger } = paths;
  return { server, client, stranger, psk, pskFolder: paths.psk };
}

function openssl(folder: string, ...args: string[]): void {
  execFileSync("openssl", args, { cwd: folder, stdio: "pipe" });
}

function makeAuthority(folder: string): void {
  openssl(
    folder,
    ...["req", "-x509", ...NEW_KEY, "-nodes", "-days", "2", "-subj", "/CN=authority"],
    ...["-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign"],
    ...["-keyout", "ca-key.pem", "-out", "ca-cert.pem"],
  );
}

function makeCertificate(authority: string, folder: string, name: string, usage: string): void {
  writeFileSync(
    join(folder, "extensions"),
    "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature,keyEncipherment\n" +
      `extendedKeyUsage=${usage}\nsubjectAltName=DNS:localhost,IP:127.0.0.1\n`,
  );
  openssl(
    folder,
    ...["req", ...NEW_KEY, "-nodes", "-subj", `/CN=${name}`],
    ...["-keyout", `${name}-key.pem`, "-out", "request"],
  );
  openssl(
    folder,
    ...["x509", "-req", "-in", "request", "-days", "2", "-extfile", "extensions", "-set_serial", "77"],
    ...["-CA", join(authority, "ca-cert.pem"), "-CAkey", join(authority, "ca-key.pem")],
    ...["-out", `${name}-cert.pem`],
  );
}
