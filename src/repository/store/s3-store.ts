// A repository in a bucket: of Amazon S3 or of whatever speaks its protocol (Ceph's radosgw, MinIO and others).
//
// Every call is one request (a list, one for each thousand names), signed (SigV4, by aws4fetch) over its body's
// SHA-256, so that what arrives is what was sent. A put has If-None-Match: * and so is exclusive where the server knows
// it (S3 since August 2024, Ceph, MinIO); where it does not (501), a HEAD comes before it. An object is there as a whole
// or not at all, and stable when the put is answered: flush has nothing to do. Buckets are consistent: a list shows what was
// put before (S3 since December 2020; radosgw always).
//
// A request that failed without saying why (500, 502, 503, 504, 429, a broken or silent connection) is tried again with
// growing pauses. A delete or touch that is carried out twice does no harm; a put whose first answer was lost finds its own
// object, which an exclusive put tells by its content.
//
// At most MAX_IN_FLIGHT requests of one store are under way; more wait their turn.

import { createHash } from "node:crypto";
import { setTimeout as delay } from "node:timers/promises";
import { AwsClient } from "aws4fetch";
import { CowcatcherError, messageOf } from "../../errors.js";
import {
  checkObjectName,
  type GetOptions,
  type ListedObject,
  notFoundError,
  type ObjectInfo,
  type PutOptions,
  type PutOutcome,
  type S3StoreDescription,
  type Store,
  tooLargeError,
} from "./store.js";

export const MAX_IN_FLIGHT = 32;
const PAGE_NAMES = 1000;
const MAX_PAGE_BYTES = 4 * 1024 * 1024;
const MAX_ERROR_BYTES = 64 * 1024;
const TRANSIENT = new Set([429, 500, 502, 503, 504]);

export interface S3Limits {
  /** Attempts of one request, the first included. */
  attempts: number;
  /** Before the second attempt; doubled each time up to the longest. */
  firstPauseMs: number;
  longestPauseMs: number;
  /** For a whole request, its body included. */
  timeoutMs: number;
}

/** Some two minutes of a store that is away. */
const LIMITS: S3Limits = { attempts: 8, firstPauseMs: 200, longestPauseMs: 30_000, timeoutMs: 120_000 };

interface Request {
  method: "GET" | "PUT" | "HEAD" | "DELETE";
  /** "": the bucket itself. */
  name: string;
  query?: Record<string, string>;
  headers?: Record<string, string>;
  body?: Uint8Array;
  /** Longest answer. */
  maxBytes: number;
}

interface Answer {
  status: number;
  headers: Headers;
  body: Buffer;
  attempt: number;
}

export class S3Store implements Store {
  readonly name: string;
  readonly #description: S3StoreDescription;
  readonly #client: AwsClient;
  readonly #limits: S3Limits;
  #inFlight = 0;
  readonly #queue: (() => void)[] = [];
  /** The server knows If-None-Match for puts. */
  #knowsCondition = true;

  constructor(description: S3StoreDescription, limits: Partial<S3Limits> = {}) {
    const { name, accessKeyId, secretAccessKey, sessionToken, region } = description;
    this.name = name;
    this.#description = description;
    this.#limits = { ...LIMITS, ...limits };
    this.#client = new AwsClient({
      accessKeyId,
      secretAccessKey,
      region,
      service: "s3",
      retries: 0,
      ...(sessionToken === undefined ? {} : { sessionToken }),
    });
  }

  async put(name: string, content: Uint8Array, { exclusive }: PutOptions): Promise<PutOutcome> {
    checkObjectName(name);
    if (!this.#knowsCondition && (await this.head(name)) !== undefined) return "present";
    const headers: Record<string, string> = this.#knowsCondition ? { "if-none-match": "*" } : {};
    const answer = await this.#request({
      method: "PUT",
      name,
      body: content,
      headers,
      maxBytes: MAX_ERROR_BYTES,
    });
    if (answer.status < 300) return "stored";
    if (answer.status === 412) {
      if (exclusive !== true || answer.attempt === 1) return "present";
      // Ours may be the one that is there: the answer to an earlier attempt was lost.
      return (await this.get(name, content.length)).equals(content) ? "stored" : "present";
    }
    if (answer.status === 501 && this.#knowsCondition) {
      this.#knowsCondition = false;
      return this.put(name, content, { durable: true, exclusive });
    }
    throw this.#failure(`write the object ${name}`, answer);
  }

  async get(name: string, maxBytes: number, { range }: GetOptions = {}): Promise<Buffer> {
    checkObjectName(name);
    const headers: Record<string, string> = {};
    if (range !== undefined) {
      headers["range"] = `bytes=${range.offsetBytes}-${range.offsetBytes + range.lengthBytes - 1}`;
    }
    const answer = await this.#request({ method: "GET", name, headers, maxBytes });
    if (answer.status === 404 && !isNoBucket(answer)) throw notFoundError(this.name, name);
    // The range begins at the object's end or behind it.
    if (answer.status === 416) return Buffer.alloc(0);
    if (answer.status >= 300) throw this.#failure(`read the object ${name}`, answer);
    return answer.body;
  }

  async head(name: string): Promise<ObjectInfo | undefined> {
    checkObjectName(name);
    const answer = await this.#request({ method: "HEAD", name, maxBytes: MAX_ERROR_BYTES });
    if (answer.status === 404) return undefined;
    if (answer.status >= 300) throw this.#failure(`examine the object ${name}`, answer);
    return {
      sizeBytes: Number(answer.headers.get("content-length") ?? 0),
      changedMs: Date.parse(answer.headers.get("last-modified") ?? "") || 0,
    };
  }

  async *list(prefix: string): AsyncGenerator<ListedObject[]> {
    const base = this.#description.prefix;
    let token: string | undefined;
    do {
      const query: Record<string, string> = {
        "list-type": "2",
        "max-keys": String(PAGE_NAMES),
        prefix: base + prefix,
        ...(token === undefined ? {} : { "continuation-token": token }),
      };
      const answer = await this.#request({ method: "GET", name: "", query, maxBytes: MAX_PAGE_BYTES });
      if (answer.status >= 300) throw this.#failure(prefix === "" ? "list" : `list ${prefix}`, answer);
      const text = answer.body.toString("utf8");
      const batch = [...text.matchAll(/<Contents>([\s\S]*?)<\/Contents>/g)].map(([, entry = ""]) => ({
        name: tagOf(entry, "Key").slice(base.length),
        sizeBytes: Number(tagOf(entry, "Size")),
      }));
      if (batch.length > 0) yield batch;
      token = tagOf(text, "IsTruncated") === "true" ? tagOf(text, "NextContinuationToken") : undefined;
    } while (token !== undefined && token !== "");
  }

  async delete(name: string): Promise<void> {
    checkObjectName(name);
    const answer = await this.#request({ method: "DELETE", name, maxBytes: MAX_ERROR_BYTES });
    if (answer.status >= 300 && (answer.status !== 404 || isNoBucket(answer))) {
      throw this.#failure(`delete the object ${name}`, answer);
    }
  }

  async touch(name: string, content: Uint8Array): Promise<void> {
    checkObjectName(name);
    const answer = await this.#request({ method: "PUT", name, body: content, maxBytes: MAX_ERROR_BYTES });
    if (answer.status >= 300) throw this.#failure(`write the object ${name}`, answer);
  }

  flush(): Promise<void> {
    return Promise.resolve();
  }

  removeLitter(): Promise<number> {
    return Promise.resolve(0);
  }

  close(): void {
    // Connections are the process's, and go when they have been idle.
  }

  async #request(request: Request): Promise<Answer> {
    await this.#enter();
    try {
      return await this.#withRetries(request);
    } finally {
      this.#leave();
    }
  }

  async #withRetries(request: Request): Promise<Answer> {
    const { attempts, firstPauseMs, longestPauseMs } = this.#limits;
    for (let attempt = 1; ; attempt++) {
      let failure: unknown;
      try {
        const answer = await this.#send(request, attempt);
        // 409: somebody else's put of the same name is under way.
        const isTransient =
          TRANSIENT.has(answer.status) || (answer.status === 409 && request.method === "PUT");
        if (!isTransient) return answer;
        if (attempt >= attempts) return answer;
      } catch (error) {
        if (error instanceof CowcatcherError) throw error;
        failure = error;
      }
      if (failure !== undefined && attempt >= attempts) throw this.#unreachable(failure);
      const pauseMs = Math.min(firstPauseMs * 2 ** (attempt - 1), longestPauseMs);
      // So that thirty-two that failed together do not come back together.
      await delay(pauseMs * (0.5 + Math.random() / 2), undefined, { ref: true });
    }
  }

  async #send({ method, name, query, headers, body, maxBytes }: Request, attempt: number): Promise<Answer> {
    const sum = createHash("sha256")
      .update(body ?? "")
      .digest("hex");
    const response = await this.#client.fetch(this.#url(name, query), {
      method,
      headers: { ...headers, "x-amz-content-sha256": sum },
      redirect: "manual",
      signal: AbortSignal.timeout(this.#limits.timeoutMs),
      ...(body === undefined ? {} : { body: body as Uint8Array<ArrayBuffer> }),
    });
    const announced = Number(response.headers.get("content-length") ?? 0);
    if (method !== "HEAD" && response.status < 300 && announced > maxBytes) {
      await response.body?.cancel();
      throw tooLargeError(this.name, name, maxBytes);
    }
    const content = Buffer.from(method === "HEAD" ? new ArrayBuffer(0) : await response.arrayBuffer());
    if (response.status < 300 && content.length > maxBytes) throw tooLargeError(this.name, name, maxBytes);
    if (method === "GET" && response.headers.has("content-length") && content.length !== announced) {
      throw new Error(`the answer has ${content.length} bytes of ${announced}`);
    }
    return { status: response.status, headers: response.headers, body: content, attempt };
  }

  #url(name: string, query: Record<string, string> = {}): string {
    const { endpoint, bucket, prefix, style } = this.#description;
    const url = new URL(endpoint);
    if (style === "virtual-host") url.hostname = `${bucket}.${url.hostname}`;
    const base = style === "virtual-host" ? "/" : `/${bucket}/`;
    const path = name === "" ? base : base + [prefix + name].map(encodePath).join("");
    const search = Object.entries(query).map(([key, value]) => `${key}=${encodeURIComponent(value)}`);
    return `${url.origin}${path}${search.length === 0 ? "" : `?${search.join("&")}`}`;
  }

  async #enter(): Promise<void> {
    if (this.#inFlight >= MAX_IN_FLIGHT) await new Promise<void>((resolve) => this.#queue.push(resolve));
    else this.#inFlight++;
  }

  #leave(): void {
    const next = this.#queue.shift();
    if (next === undefined) this.#inFlight--;
    else next();
  }

  #failure(action: string, { status, body }: Answer): CowcatcherError {
    const text = body.toString("utf8");
    const code = tagOf(text, "Code");
    const { problem, hint } = explain(code, status, this.#description);
    const words = problem ?? (tagOf(text, "Message") || `the server answers ${status} ${code}`.trim());
    return new CowcatcherError({
      code: status === 507 || code === "QuotaExceeded" ? "NO_SPACE" : "IO",
      object: this.name,
      problem: `cannot ${action}: ${words}`,
      hint,
      errno: status === 507 || code === "QuotaExceeded" ? "EDQUOT" : status === 403 ? "EACCES" : "EIO",
    });
  }

  #unreachable(cause: unknown): CowcatcherError {
    // fetch says only that it failed; why is in the cause.
    const inner = cause instanceof Error && cause.cause !== undefined ? cause.cause : cause;
    return new CowcatcherError({
      code: "IO",
      object: this.name,
      problem: `the server cannot be reached: ${messageOf(inner)}`,
      hint: `tried ${this.#limits.attempts} times; see whether ${this.#description.endpoint} is right and up`,
      errno: "EIO",
      cause,
    });
  }
}

function isNoBucket({ body }: Answer): boolean {
  return tagOf(body.toString("utf8"), "Code") === "NoSuchBucket";
}

/** What a user can make of the server's code. */
function explain(
  code: string,
  status: number,
  { bucket, region, accessKeyId }: S3StoreDescription,
): { problem?: string; hint?: string } {
  switch (code) {
    case "NoSuchBucket":
      return { problem: `there is no bucket ${bucket}`, hint: "make it first, with the provider's own tool" };
    case "InvalidAccessKeyId":
      return {
        problem: `the server does not know the access key ${accessKeyId}`,
        hint: "see AWS_ACCESS_KEY_ID",
      };
    case "SignatureDoesNotMatch":
      return {
        problem: "the secret key is not that of the access key, or the region is wrong",
        hint: `see AWS_SECRET_ACCESS_KEY and AWS_REGION (${region})`,
      };
    case "AuthorizationHeaderMalformed":
      return { problem: `the bucket is not in the region ${region}`, hint: "set AWS_REGION" };
    case "RequestTimeTooSkewed":
      return { problem: "this machine's clock is wrong", hint: "set it, with timedatectl or an NTP client" };
    case "AccessDenied":
      return { problem: "access denied", hint: "the key needs to get, put, delete and list in this bucket" };
    default:
      // A HEAD has no body that could say more.
      return status === 403
        ? {
            problem: "access denied",
            hint: "see the key, its rights on the bucket, and this machine's clock",
          }
        : {};
  }
}

function tagOf(xml: string, tag: string): string {
  const text = new RegExp(`<${tag}>([^<]*)</${tag}>`).exec(xml)?.[1] ?? "";
  return text.replace(/&(amp|lt|gt|quot|apos|#x?[0-9a-fA-F]+);/g, (_, entity: string) =>
    decodeEntity(entity),
  );
}

const ENTITIES: Record<string, string> = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'" };

function decodeEntity(entity: string): string {
  if (!entity.startsWith("#")) return ENTITIES[entity] ?? "";
  const code = entity.startsWith("#x") ? Number.parseInt(entity.slice(2), 16) : Number(entity.slice(1));
  return String.fromCodePoint(code);
}

/** Slashes stay: they are part of names. */
function encodePath(path: string): string {
  return path.split("/").map(encodeURIComponent).join("/");
}
