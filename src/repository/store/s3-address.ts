// s3:https://HOST[:PORT]/BUCKET[/PREFIX], and the credentials: from the environment or a file, never from a command line.

import { readFileSync } from "node:fs";
import { homedir } from "node:os";
import { join } from "node:path";
import { CowcatcherError } from "../../errors.js";
import type { S3StoreDescription } from "./store.js";

const DEFAULT_REGION = "us-east-1";
const BUCKET = /^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$/;
const PREFIX = /^(?:[A-Za-z0-9][A-Za-z0-9._+=@-]*\/)*$/;

type Environment = Record<string, string | undefined>;

export function isS3Address(address: string): boolean {
  return address.startsWith("s3:");
}

/** @throws CowcatcherError USAGE for an address that is none, or where there are no credentials. */
export function describeS3(address: string, environment: Environment = process.env): S3StoreDescription {
  const { endpoint, bucket, prefix, isAmazon } = parseAddress(address);
  const { accessKeyId, secretAccessKey, sessionToken } = credentials(address, environment);
  const style = environment["COWCATCHER_S3_STYLE"] ?? (isAmazon ? "virtual-host" : "path");
  if (style !== "path" && style !== "virtual-host") {
    throw usage("COWCATCHER_S3_STYLE", `'${style}' is not known`, "give path or virtual-host");
  }
  return {
    kind: "s3",
    name: address,
    endpoint,
    bucket,
    prefix,
    region: environment["AWS_REGION"] ?? environment["AWS_DEFAULT_REGION"] ?? DEFAULT_REGION,
    style,
    accessKeyId,
    secretAccessKey,
    sessionToken,
  };
}

function parseAddress(address: string): {
  endpoint: string;
  bucket: string;
  prefix: string;
  isAmazon: boolean;
} {
  const wrong = (problem: string): never => {
    throw usage(address, problem, "give s3:https://HOST[:PORT]/BUCKET[/PREFIX]");
  };
  let url: URL;
  try {
    url = new URL(address.slice("s3:".length));
  } catch {
    return wrong("is no address of a bucket");
  }
  if (url.protocol !== "https:" && url.protocol !== "http:") wrong("is neither https nor http");
  if (url.username !== "" || url.password !== "") wrong("has credentials in it, which do not belong there");
  if (url.search !== "" || url.hash !== "") wrong("has more than host, bucket and prefix");
  const [bucket = "", ...rest] = url.pathname.slice(1).split("/");
  const folders = rest.filter((part) => part !== "");
  const prefix = folders.length === 0 ? "" : `${folders.join("/")}/`;
  if (!BUCKET.test(bucket)) wrong(bucket === "" ? "names no bucket" : `'${bucket}' is no name of a bucket`);
  if (!PREFIX.test(prefix)) wrong("has a prefix with other than letters, digits and . _ + = @ -");
  return { endpoint: url.origin, bucket, prefix, isAmazon: /(?:^|\.)amazonaws\.com$/.test(url.hostname) };
}

interface Credentials {
  accessKeyId: string;
  secretAccessKey: string;
  sessionToken: string | undefined;
}

function credentials(address: string, environment: Environment): Credentials {
  const { AWS_ACCESS_KEY_ID: id, AWS_SECRET_ACCESS_KEY: secret, AWS_SESSION_TOKEN: token } = environment;
  if (id && secret) return { accessKeyId: id, secretAccessKey: secret, sessionToken: token };
  const path = environment["AWS_SHARED_CREDENTIALS_FILE"] ?? join(homedir(), ".aws", "credentials");
  const profile = environment["AWS_PROFILE"] ?? "default";
  const found = readProfile(path, profile);
  if (found !== undefined) return found;
  throw usage(
    address,
    "there are no credentials for it",
    `set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or write them to [${profile}] in ${path}`,
  );
}

/** The ini file that Amazon's own tools read. */
function readProfile(path: string, profile: string): Credentials | undefined {
  let text: string;
  try {
    text = readFileSync(path, "utf8");
  } catch {
    return undefined;
  }
  const values = new Map<string, string>();
  let section = "";
  for (const line of text.split(/\r?\n/)) {
    const heading = /^\s*\[\s*([^\]]+?)\s*\]/.exec(line);
    if (heading !== null) section = heading[1] ?? "";
    const entry = /^\s*([a-z_]+)\s*=\s*(.*?)\s*$/i.exec(line);
    if (entry !== null && section === profile) values.set((entry[1] ?? "").toLowerCase(), entry[2] ?? "");
  }
  const accessKeyId = values.get("aws_access_key_id");
  const secretAccessKey = values.get("aws_secret_access_key");
  if (!accessKeyId || !secretAccessKey) return undefined;
  return { accessKeyId, secretAccessKey, sessionToken: values.get("aws_session_token") };
}

function usage(object: string, problem: string, hint: string): CowcatcherError {
  return new CowcatcherError({ code: "USAGE", object, problem, hint });
}
