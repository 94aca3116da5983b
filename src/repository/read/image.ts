// A disk of a backup as an image that is read: for info, map, compare, serve, and as the source of a copy. Main thread.
//
// The last few chunks that were read are kept, as a guest reads a chunk in many pieces. Memory: CACHED_CHUNKS times the
// chunk size.

import type {
  BlockStatus,
  Completion,
  FrozenSource,
  Image,
  RepositorySourceDescription,
} from "../../block/device.js";
import { CowcatcherError } from "../../errors.js";
import type { DiskIndex } from "../format/index.js";
import type { Manifest } from "../format/manifest.js";
import { isHole } from "../format/names.js";
import type { Repository } from "../repository.js";
import { ChunkReader } from "./chunk-reader.js";

const CACHED_CHUNKS = 8;

export class RepositoryImage implements Image {
  readonly path: string;
  readonly name: string;
  readonly sizeBytes: number;
  readonly readOnly = true;
  readonly clusterSizeBytes: number;
  readonly format = "raw" as const;
  readonly probed = false;
  readonly backing = null;
  readonly files = [];
  readonly #index: DiskIndex;
  readonly #reader: ChunkReader;
  /** By chunk number; the one used last is the last one. A read that is under way is shared. */
  readonly #cache = new Map<number, Promise<Uint8Array>>();

  /** The repository becomes the image's, which closes it. */
  constructor(
    address: string,
    readonly repository: Repository,
    readonly manifest: Manifest,
    readonly disk: string,
    index: DiskIndex,
  ) {
    this.path = this.name = address;
    this.sizeBytes = index.sizeBytes;
    this.clusterSizeBytes = index.chunkBytes;
    this.#index = index;
    this.#reader = new ChunkReader(repository.store, repository.secrets, index.chunkBytes);
  }

  async read(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<void> {
    const { chunkBytes, ids } = this.#index;
    const end = offsetBytes + lengthBytes;
    for (let at = offsetBytes; at < end;) {
      const chunk = Math.floor(at / chunkBytes);
      const from = at - chunk * chunkBytes;
      const count = Math.min(chunkBytes - from, end - at);
      const target = bufferOffset + (at - offsetBytes);
      if (isHole(ids, chunk)) buffer.fill(0, target, target + count);
      else buffer.set((await this.#chunk(chunk)).subarray(from, from + count), target);
      at += count;
    }
  }

  #chunk(chunk: number): Promise<Uint8Array> {
    const cached = this.#cache.get(chunk) ?? this.#load(chunk);
    this.#cache.delete(chunk);
    this.#cache.set(chunk, cached);
    const [oldest] = this.#cache.keys();
    if (this.#cache.size > CACHED_CHUNKS && oldest !== undefined) this.#cache.delete(oldest);
    // What failed is tried again the next time.
    cached.catch(() => this.#cache.delete(chunk));
    return cached;
  }

  async #load(chunk: number): Promise<Uint8Array> {
    const { chunkBytes } = this.#index;
    const content = Buffer.allocUnsafeSlow(Math.min(chunkBytes, this.sizeBytes - chunk * chunkBytes));
    try {
      await this.#reader.readChunk(this.#index, chunk, content);
      return content;
    } catch (error) {
      throw atOffset(error, chunk * chunkBytes);
    }
  }

  blockStatus(offsetBytes: number, lengthBytes: number): BlockStatus {
    const { lengthBytes: length, zero } = extentOf(this.#index, offsetBytes, lengthBytes);
    return { lengthBytes: length, zero, data: !zero, depth: 0, present: !zero, compressed: !zero };
  }

  write(): Completion {
    return Promise.reject(this.#readOnlyError());
  }

  writeZeroes(): Completion {
    return Promise.reject(this.#readOnlyError());
  }

  discard(): Completion {
    return undefined;
  }

  flush(): Completion {
    return undefined;
  }

  freeze(): FrozenSource {
    const { ids, patches, chunkBytes } = this.#index;
    const { storeDescription, secrets } = this.repository;
    const description: RepositorySourceDescription = {
      format: "repository",
      name: this.name,
      sizeBytes: this.sizeBytes,
      chunkBytes,
      ids: shared(ids),
      patches: shared(patches.bytes),
      store: storeDescription,
      secrets: secrets.description,
      isRemote: storeDescription.kind === "s3",
    };
    return { description, release: () => {} };
  }

  close(): Promise<void> {
    this.#reader.close();
    this.repository.close();
    return Promise.resolve();
  }

  #readOnlyError(): CowcatcherError {
    return new CowcatcherError({
      code: "IO",
      object: this.name,
      problem: "a backup cannot be written",
      hint: "restore it, or write to an overlay on it",
      errno: "EROFS",
    });
  }
}

function shared(bytes: Uint8Array): SharedArrayBuffer {
  const memory = new SharedArrayBuffer(bytes.length);
  new Uint8Array(memory).set(bytes);
  return memory;
}

/** The longest run from offsetBytes on of chunks that are all holes, or all are not. */
export function extentOf(
  { chunkBytes, ids }: Pick<DiskIndex, "chunkBytes" | "ids">,
  offsetBytes: number,
  lengthBytes: number,
): { lengthBytes: number; zero: boolean } {
  const end = offsetBytes + lengthBytes;
  const first = Math.floor(offsetBytes / chunkBytes);
  const zero = isHole(ids, first);
  let chunk = first + 1;
  while (chunk * chunkBytes < end && isHole(ids, chunk) === zero) chunk++;
  return { lengthBytes: Math.min(chunk * chunkBytes, end) - offsetBytes, zero };
}

/** With the place on the disk that cannot be read. */
export function atOffset(error: unknown, offsetBytes: number): unknown {
  if (!(error instanceof CowcatcherError) || error.offsetBytes !== undefined) return error;
  return new CowcatcherError({ ...error.toDetails(), offsetBytes, cause: error });
}
