// Storing chunks: the work of one thread of a backup.
//
//   hash ─► known? ─► claim (claims.ts) ─► there? ─► compress, encrypt ─► put
//             yes: nothing to do            yes: nothing to do
//
// Several calls may be under way at a time; each that encodes has an encoder of its own, which is kept. Memory: three
// times the chunk size for each of them.

import { CowcatcherError } from "../../errors.js";
import { type ChunkCompression, ChunkEncoder } from "../format/chunk.js";
import { chunkName, MAX_GENERATION } from "../format/names.js";
import { Secrets, type SecretsDescription } from "../format/secrets.js";
import { openStore } from "../store/open-store.js";
import type { Store, StoreDescription } from "../store/store.js";
import { Claimer, type Condemned } from "../work/claims.js";
import { SharedIdSet, type SharedIdSetBuffers } from "../work/id-set.js";

/** Plain data, to cross to workers. */
export interface ChunkWriterDescription {
  store: StoreDescription;
  secrets: SecretsDescription;
  chunkBytes: number;
  compression: ChunkCompression;
  run: string;
  /** What the backup may rely on without a claim: it has one already. */
  known: SharedIdSetBuffers;
  /** COUNTER_WORDS 64-bit words. */
  counters: SharedArrayBuffer;
}

export const CNT_NEW_CHUNKS = 0;
export const CNT_NEW_BYTES = 1;
export const CNT_READ_BYTES = 2;
export const COUNTER_WORDS = 4;

export class ChunkWriter {
  readonly #secrets: Secrets;
  readonly #store: Store;
  readonly #claimer: Claimer;
  readonly #known: SharedIdSet;
  readonly #counters: BigInt64Array;
  readonly #idleEncoders: ChunkEncoder[] = [];
  readonly #newEncoder: () => ChunkEncoder;

  /** @param lane names this thread among those of the run: letters a to f and digits */
  constructor(description: ChunkWriterDescription, lane: string, store?: Store) {
    const { secrets, chunkBytes, compression, run, known, counters } = description;
    this.#secrets = new Secrets(secrets);
    this.#store = store ?? openStore(description.store, true);
    this.#claimer = new Claimer(this.#store, run, lane);
    this.#known = new SharedIdSet(known);
    this.#counters = new BigInt64Array(counters);
    this.#newEncoder = () => new ChunkEncoder(this.#secrets, chunkBytes, compression, this.#store.name);
  }

  /**
   * The chunk with this content is in the store afterwards, and stays there while the run is at work.
   * @param content must not change before the promise is fulfilled
   * @returns its id. @throws CowcatcherError IO, NO_SPACE
   */
  async write(content: Uint8Array): Promise<Uint8Array> {
    Atomics.add(this.#counters, CNT_READ_BYTES, BigInt(content.length));
    const id = this.#secrets.chunkId(content);
    if (this.#known.has(id)) return id;
    const condemned = await this.#claimer.claim(id);
    const name = nameFor(id, condemned, this.#store.name);
    if ((await this.#store.head(name)) === undefined) await this.#put(name, id, content);
    this.#known.add(id);
    return id;
  }

  async #put(name: string, id: Uint8Array, content: Uint8Array): Promise<void> {
    const encoder = this.#idleEncoders.pop() ?? this.#newEncoder();
    try {
      const object = encoder.encode(id, content);
      if ((await this.#store.put(name, object, { durable: true })) === "present") return;
      Atomics.add(this.#counters, CNT_NEW_CHUNKS, 1n);
      Atomics.add(this.#counters, CNT_NEW_BYTES, BigInt(object.length));
    } finally {
      this.#idleEncoders.push(encoder);
    }
  }

  /** What was written is stable, but for the names of chunks that were there. */
  flush(): Promise<void> {
    return this.#store.flush();
  }

  close(): void {
    for (const encoder of this.#idleEncoders) encoder.close();
    this.#store.close();
  }
}

/** The first name of the chunk that nobody is about to delete. */
function nameFor(id: Uint8Array, condemned: Condemned, storeName: string): string {
  for (let generation = 0; generation <= MAX_GENERATION; generation++) {
    if (!condemned.isCondemned(id, generation)) return chunkName(id, generation);
  }
  throw new CowcatcherError({
    code: "LIMIT",
    object: storeName,
    problem: `all ${MAX_GENERATION + 1} names of a chunk are about to be deleted by prunes that do not end`,
    hint: "see the lists under locks/",
  });
}
