// Getting chunks: the object under its name, or under one of a later generation (work/claims.ts), decoded and checked; for
// one that is a patch (format/patch.ts) that of its base, and what the patch has over it.
// One thread; several calls may be under way at a time.

import { ChunkDecoder, type ChunkKind, maxChunkObjectBytes } from "../format/chunk.js";
import { damagedError } from "../format/errors.js";
import type { ChunkMap } from "../format/index.js";
import { chunkName, chunkNameOfHex, parseChunkName } from "../format/names.js";
import { applyPatch, blockBytesOf } from "../format/patch.js";
import { patchOfRecord } from "../format/patch-table.js";
import { ID_BYTES, type Secrets } from "../format/secrets.js";
import { isNotFound, type Store } from "../store/store.js";
import { ObjectMemory } from "./object-memory.js";

export class ChunkReader {
  readonly #store: Store;
  readonly #decoder: ChunkDecoder;
  readonly #maxBytes: number;
  readonly #chunkBytes: number;
  readonly #memory: ObjectMemory;

  constructor(store: Store, secrets: Secrets, chunkBytes: number) {
    this.#store = store;
    this.#decoder = new ChunkDecoder(secrets, chunkBytes, store.name);
    this.#chunkBytes = chunkBytes;
    this.#maxBytes = maxChunkObjectBytes(chunkBytes);
    this.#memory = new ObjectMemory(this.#maxBytes);
  }

  /**
   * The content of a disk's chunk that is no hole. @param into of the content's length
   * @throws as read
   */
  async readChunk({ ids, patches }: ChunkMap, chunk: number, into: Uint8Array): Promise<void> {
    const id = ids.subarray(chunk * ID_BYTES, (chunk + 1) * ID_BYTES);
    const record = patches.find(chunk);
    if (record === undefined) return this.read(id, into);
    const { base } = patchOfRecord(record);
    await this.read(base, into);
    await this.#readAny(id, (name) =>
      this.#readObject(name, id, "patch", undefined, (content) => {
        if (applyPatch(content, base, into, blockBytesOf(this.#chunkBytes))) return;
        throw damagedError(this.#store.name, name, "it is a patch of another chunk");
      }),
    );
  }

  /**
   * The content of a chunk; of several objects that hold it the first one that is whole.
   * @param into of the content's length
   * @throws CowcatcherError NOT_FOUND, FORMAT: never a wrong byte, though `into` may hold some then
   */
  read(id: Uint8Array, into: Uint8Array): Promise<void> {
    return this.#readAny(id, (name) => this.#readObject(name, id, "chunk", into));
  }

  /**
   * Lets `use` look at a chunk, whose content is not compared with its id: for whoever only wants to know where another
   * content differs. @throws as read
   */
  async peek<Result>(id: Uint8Array, use: (content: Buffer) => Result): Promise<Result> {
    const found: { result?: Result } = {};
    await this.#readAny(id, (name) =>
      this.#memory.with(async (memory) => {
        const object = await this.#store.get(name, this.#maxBytes, { memory });
        found.result = use(this.#decoder.peek(name, id, object));
      }),
    );
    return found.result as Result;
  }

  async #readAny(id: Uint8Array, readObject: (name: string) => Promise<void>): Promise<void> {
    const first = chunkName(id);
    try {
      await readObject(first);
      return;
    } catch (error) {
      const others = (await this.#names(id)).filter((name) => name !== first);
      for (const name of others) {
        try {
          await readObject(name);
          return;
        } catch (next) {
          if (!isNotFound(error) || isNotFound(next)) continue;
          throw next;
        }
      }
      throw error;
    }
  }

  #readObject(
    name: string,
    id: Uint8Array,
    kind: ChunkKind,
    into: Uint8Array | undefined,
    use?: (content: Buffer) => void,
  ): Promise<void> {
    return this.#memory.with(async (memory) => {
      const object = await this.#store.get(name, this.#maxBytes, { memory });
      const content = this.#decoder.decode(name, id, object, into, kind);
      use?.(content);
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
