// A worker's view of a disk of a backup. A read of a whole chunk is decoded straight into the caller's buffer; one of a
// part keeps the chunk, as its next part is the next read as a rule.

import type { RepositorySourceDescription, SourceReader } from "../../block/device.js";
import type { ChunkMap } from "../format/index.js";
import { isHole } from "../format/names.js";
import { PatchTable } from "../format/patch-table.js";
import { Secrets, type SecretsDescription } from "../format/secrets.js";
import { openStore } from "../store/open-store.js";
import type { Store, StoreDescription } from "../store/store.js";
import { ChunkReader } from "./chunk-reader.js";
import { atOffset, extentOf } from "./image.js";

/** Chunks kept for reads of parts: those of the lanes that one thread may have. */
const CACHED_CHUNKS = 8;

export class RepositorySourceReader implements SourceReader {
  readonly sizeBytes: number;
  readonly #chunkBytes: number;
  readonly #map: ChunkMap;
  readonly #store: Store;
  readonly #reader: ChunkReader;
  readonly #cache = new Map<number, Promise<Uint8Array>>();

  constructor(description: RepositorySourceDescription) {
    const { sizeBytes, chunkBytes, ids, patches, store, secrets } = description;
    this.sizeBytes = sizeBytes;
    this.#chunkBytes = chunkBytes;
    this.#map = { ids: new Uint8Array(ids), patches: new PatchTable(new Uint8Array(patches)) };
    // The descriptions are what RepositoryImage.freeze has put there; the interface below this room knows no more of them.
    this.#store = openStore(store as StoreDescription, true);
    this.#reader = new ChunkReader(this.#store, new Secrets(secrets as SecretsDescription), chunkBytes);
  }

  async read(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<void> {
    const chunkBytes = this.#chunkBytes;
    const end = offsetBytes + lengthBytes;
    for (let at = offsetBytes; at < end;) {
      const chunk = Math.floor(at / chunkBytes);
      const start = chunk * chunkBytes;
      const from = at - start;
      const wholeBytes = Math.min(chunkBytes, this.sizeBytes - start);
      const count = Math.min(wholeBytes - from, end - at);
      const into = buffer.subarray(
        bufferOffset + (at - offsetBytes),
        bufferOffset + (at - offsetBytes) + count,
      );
      if (isHole(this.#map.ids, chunk)) into.fill(0);
      else if (count === wholeBytes) await this.#load(chunk, into);
      else into.set((await this.#cached(chunk, wholeBytes)).subarray(from, from + count));
      at += count;
    }
  }

  #cached(chunk: number, lengthBytes: number): Promise<Uint8Array> {
    let content = this.#cache.get(chunk);
    if (content === undefined) {
      content = this.#load(chunk, Buffer.allocUnsafeSlow(lengthBytes));
      content.catch(() => this.#cache.delete(chunk));
    }
    this.#cache.delete(chunk);
    this.#cache.set(chunk, content);
    const [oldest] = this.#cache.keys();
    if (this.#cache.size > CACHED_CHUNKS && oldest !== undefined) this.#cache.delete(oldest);
    return content;
  }

  async #load(chunk: number, into: Uint8Array): Promise<Uint8Array> {
    try {
      await this.#reader.readChunk(this.#map, chunk, into);
      return into;
    } catch (error) {
      throw atOffset(error, chunk * this.#chunkBytes);
    }
  }

  extent(offsetBytes: number, lengthBytes: number): { lengthBytes: number; zero: boolean } {
    return extentOf({ chunkBytes: this.#chunkBytes, ids: this.#map.ids }, offsetBytes, lengthBytes);
  }

  close(): void {
    this.#reader.close();
    this.#store.close();
  }
}
