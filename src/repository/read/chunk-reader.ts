// Getting chunks: the object under its name, or under one of a later generation (work/claims.ts), decoded and checked.
// One thread; several calls may be under way at a time.

import { ChunkDecoder, maxChunkObjectBytes } from "../format/chunk.js";
import { chunkName, chunkNameOfHex, parseChunkName } from "../format/names.js";
import type { Secrets } from "../format/secrets.js";
import { isNotFound, type Store } from "../store/store.js";
import { ObjectMemory } from "./object-memory.js";

export class ChunkReader {
  readonly #store: Store;
  readonly #decoder: ChunkDecoder;
  readonly #maxBytes: number;
  readonly #memory: ObjectMemory;

  constructor(store: Store, secrets: Secrets, chunkBytes: number) {
    this.#store = store;
    this.#decoder = new ChunkDecoder(secrets, chunkBytes, store.name);
    this.#maxBytes = maxChunkObjectBytes(chunkBytes);
    this.#memory = new ObjectMemory(this.#maxBytes);
  }

  /**
   * The content of a chunk; of several objects that hold it the first one that is whole.
   * @param into of the content's length
   * @throws CowcatcherError NOT_FOUND, FORMAT: never a wrong byte, though `into` may hold some then
   */
  async read(id: Uint8Array, into: Uint8Array): Promise<void> {
    const first = chunkName(id);
    try {
      await this.#readObject(first, id, into);
      return;
    } catch (error) {
      const others = (await this.#names(id)).filter((name) => name !== first);
      for (const name of others) {
        try {
          await this.#readObject(name, id, into);
          return;
        } catch (next) {
          if (!isNotFound(error) || isNotFound(next)) continue;
          throw next;
        }
      }
      throw error;
    }
  }

  #readObject(name: string, id: Uint8Array, into: Uint8Array): Promise<void> {
    return this.#memory.with(async (memory) => {
      const object = await this.#store.get(name, this.#maxBytes, { memory });
      this.#decoder.decode(name, id, object, into);
    });
  }

  async #names(id: Uint8Array): Promise<string[]> {
    const names: string[] = [];
    const prefix = chunkNameOfHex(Buffer.from(id.buffer, id.byteOffset, id.length).toString("hex"), 0);
    for await (const batch of this.#store.list(prefix)) {
      for (const { name } of batch) if (parseChunkName(name) !== undefined) names.push(name);
    }
    return names;
  }

  close(): void {
    this.#decoder.close();
  }
}
