// A bucket in memory behind HTTP: enough of S3 for the store's tests, signatures checked by its own reckoning, and
// misbehaving on request: it fails, stalls, cuts off, loses answers.
import { createHash, createHmac } from "node:crypto";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";

export const ACCESS_KEY = "AKIDEXAMPLE";
export const SECRET_KEY = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";
export const BUCKET = "backups";

export type Fault =
  /** Answers with this status and does nothing. */
  | { kind: "status"; status: number; code?: string }
  /** Breaks the connection before it does anything, or after it has done what was asked. */
  | { kind: "break"; when: "before" | "after" }
  /** Says nothing for ever. */
  | { kind: "stall" }
  /** Sends a half of the body and breaks the connection. */
  | { kind: "cut" };

export interface FakeS3Options {
  /** As servers that do not know If-None-Match: 501. */
  knowsCondition?: boolean;
  pageSize?: number;
}

interface Stored {
  content: Buffer;
  changed: Date;
}

export class FakeS3 {
  readonly objects = new Map<string, Stored>();
  readonly requests: string[] = [];
  /** Asked for each request; the fault that it meets. */
  faultFor: (request: string, index: number) => Fault | undefined = () => undefined;
  /** Where set, no request is answered before it is fulfilled. */
  gate: Promise<void> | undefined;
  inFlight = 0;
  inFlightMax = 0;
  readonly #server: Server;
  readonly #options: FakeS3Options;

  private constructor(options: FakeS3Options) {
    this.#options = options;
    this.#server = createServer((request, response) => void this.#serve(request, response));
  }

  static async listen(options: FakeS3Options = {}): Promise<FakeS3> {
    const fake = new FakeS3(options);
    await new Promise<void>((resolve) => fake.#server.listen(0, "127.0.0.1", resolve));
    return fake;
  }

  get endpoint(): string {
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}`;
  }

  get address(): string {
    return `s3:${this.endpoint}/${BUCKET}/some/prefix`;
  }

  get environment(): Record<string, string> {
    return { AWS_ACCESS_KEY_ID: ACCESS_KEY, AWS_SECRET_ACCESS_KEY: SECRET_KEY, AWS_REGION: "eu-test-1" };
  }

  async close(): Promise<void> {
    this.#server.closeAllConnections();
    await new Promise((resolve) => this.#server.close(resolve));
  }

  async #serve(request: IncomingMessage, response: ServerResponse): Promise<void> {
    this.inFlightMax = Math.max(this.inFlightMax, ++this.inFlight);
    response.on("close", () => this.inFlight--);
    const parts: Buffer[] = [];
    try {
      for await (const part of request) parts.push(part as Buffer);
    } catch {
      return;
    }
    const body = Buffer.concat(parts);
    await this.gate;
    const line = `${request.method ?? ""} ${request.url ?? ""}`;
    const fault = this.faultFor(line, this.requests.push(line) - 1);
    if (fault?.kind === "stall") return;
    if (fault?.kind === "break" && fault.when === "before") return void request.socket.destroy();
    if (fault?.kind === "status") return fail(response, fault.status, fault.code ?? "SlowDown");
    const refusal = signatureFault(request, body);
    if (refusal !== undefined) return fail(response, 403, refusal);
    if (fault?.kind === "break") {
      this.#act(request, body, new Sink());
      return void request.socket.destroy();
    }
    if (fault?.kind === "cut") {
      const sink = new Sink();
      this.#act(request, body, sink);
      response.writeHead(sink.status, { ...sink.headers, "content-length": sink.body.length });
      response.write(sink.body.subarray(0, sink.body.length >> 1), () => request.socket.destroy());
      return;
    }
    const sink = new Sink();
    this.#act(request, body, sink);
    const headers = { "content-length": sink.body.length, ...sink.headers };
    response.writeHead(sink.status, headers).end(request.method === "HEAD" ? undefined : sink.body);
  }

  #act({ method, url = "", headers }: IncomingMessage, body: Buffer, sink: Sink): void {
    const { pathname, searchParams } = new URL(url, "http://x");
    const [, bucket, ...rest] = pathname.split("/").map(decodeURIComponent);
    if (bucket !== BUCKET) return sink.fail(404, "NoSuchBucket");
    const key = rest.join("/");
    if (key === "") return this.#list(searchParams, sink);
    const stored = this.objects.get(key);
    switch (method) {
      case "PUT":
        if (headers["if-none-match"] === "*") {
          if (this.#options.knowsCondition === false) return sink.fail(501, "NotImplemented");
          if (stored !== undefined) return sink.fail(412, "PreconditionFailed");
        }
        this.objects.set(key, { content: body, changed: new Date() });
        return;
      case "DELETE":
        this.objects.delete(key);
        sink.status = 204;
        return;
      case undefined:
      default:
        if (stored === undefined) return sink.fail(404, "NoSuchKey");
        return sink.send(stored, headers.range, method === "HEAD");
    }
  }

  #list(query: URLSearchParams, sink: Sink): void {
    const prefix = query.get("prefix") ?? "";
    const after = query.get("continuation-token") ?? "";
    const size = Math.min(Number(query.get("max-keys") ?? 1000), this.#options.pageSize ?? 1000);
    const names = [...this.objects.keys()].filter((name) => name.startsWith(prefix) && name > after).sort();
    const page = names.slice(0, size);
    const entries = page.map(
      (name) =>
        `<Contents><Key>${name}</Key><Size>${this.objects.get(name)?.content.length ?? 0}</Size></Contents>`,
    );
    const more = names.length > size;
    const next = more ? `<NextContinuationToken>${page.at(-1) ?? ""}</NextContinuationToken>` : "";
    sink.body = Buffer.from(
      `<ListBucketResult><IsTruncated>${more}</IsTruncated>${next}${entries.join("")}</ListBucketResult>`,
    );
  }
}

class Sink {
  status = 200;
  headers: Record<string, string | number> = {};
  body: Buffer = Buffer.alloc(0);

  fail(status: number, code: string): void {
    this.status = status;
    this.body = errorBody(code);
  }

  send({ content, changed }: Stored, range: string | undefined, isHead: boolean): void {
    this.headers["last-modified"] = changed.toUTCString();
    this.body = content;
    if (isHead) this.headers["content-length"] = content.length;
    const match = /^bytes=(\d+)-(\d+)$/.exec(range ?? "");
    if (match === null) return;
    const start = Number(match[1]);
    if (start >= content.length) return this.fail(416, "InvalidRange");
    this.status = 206;
    this.body = content.subarray(start, Number(match[2]) + 1);
  }
}

function errorBody(code: string): Buffer {
  return Buffer.from(
    `<?xml version="1.0"?><Error><Code>${code}</Code><Message>no &amp; no</Message></Error>`,
  );
}

function fail(response: ServerResponse, status: number, code: string): void {
  response.writeHead(status).end(errorBody(code));
}

/** SigV4, as Amazon's documents have it ("Signature Version 4 signing process"). */
function signatureFault(
  { method = "", url = "", headers }: IncomingMessage,
  body: Buffer,
): string | undefined {
  const match =
    /^AWS4-HMAC-SHA256 Credential=([^/]+)\/(\d{8})\/([^/]+)\/s3\/aws4_request, SignedHeaders=([^,]+), Signature=([0-9a-f]{64})$/.exec(
      headers.authorization ?? "",
    );
  if (match === null) return "AccessDenied";
  const [, accessKey = "", day = "", region = "", signed = "", signature = ""] = match;
  if (accessKey !== ACCESS_KEY) return "InvalidAccessKeyId";
  const sum = createHash("sha256").update(body).digest("hex");
  if (headers["x-amz-content-sha256"] !== sum) return "XAmzContentSHA256Mismatch";
  const { pathname, searchParams } = new URL(url, "http://x");
  const pairs = [...searchParams].map(([key, value]) => `${strict(key)}=${strict(value)}`).sort();
  const names = signed.split(";");
  if (!names.includes("host") || !names.includes("x-amz-date")) return "AccessDenied";
  const canonical = [
    method,
    pathname
      .split("/")
      .map((part) => strict(decodeURIComponent(part)))
      .join("/"),
    pairs.join("&"),
    ...names.map((name) => `${name}:${String(headers[name]).trim()}`),
    "",
    signed,
    sum,
  ].join("\n");
  const date = String(headers["x-amz-date"]);
  const scope = `${day}/${region}/s3/aws4_request`;
  const text = ["AWS4-HMAC-SHA256", date, scope, createHash("sha256").update(canonical).digest("hex")].join(
    "\n",
  );
  const hmac = (key: string | Buffer, data: string): Buffer =>
    createHmac("sha256", key).update(data).digest();
  const key = hmac(hmac(hmac(hmac(`AWS4${SECRET_KEY}`, day), region), "s3"), "aws4_request");
  return hmac(key, text).toString("hex") === signature ? undefined : "SignatureDoesNotMatch";
}

function strict(text: string): string {
  return encodeURIComponent(text).replace(
    /[!'()*]/g,
    (c) => `%${c.charCodeAt(0).toString(16).toUpperCase()}`,
  );
}
