// Storing chunks: the work of one thread of a backup.
//
//   hash ─► known? ─► claim (claims.ts) ─► there? ─► compress, encrypt ─► put
//             yes: nothing to do            yes: nothing to do
//
// Several calls may be under way at a time; each that encodes has an encoder of its own, which is kept. Memory: three
// times the chunk size for each of them. Which of a disk's chunks are stored in parts: disk-chunks.ts.

import { CowcatcherError } from "../../errors.js";
import { type ChunkCompression, ChunkEncoder, type ChunkKind } from "../format/chunk.js";
import { chunkName, MAX_GENERATION } from "../format/names.js";
import { blockBytesOf, encodePatch, maxPatchBytes } from "../format/patch.js";
import { Secrets, type SecretsDescription } from "../format/secrets.js";
import { ChunkReader } from "../read/chunk-reader.js";
import { ObjectMemory } from "../read/object-memory.js";
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
  /** What backups are in want of: stored whole where its content is found. */
  wanted: SharedIdSetBuffers;
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
  readonly #wanted: SharedIdSet;
  readonly #counters: BigInt64Array;
  readonly #idleEncoders: ChunkEncoder[] = [];
  readonly #newEncoder: () => ChunkEncoder;
  readonly #chunkBytes: number;
  readonly #patches: ObjectMemory;
  #reader: ChunkReader | undefined;

  /** @param lane names this thread among those of the run: letters a to f and digits */
  constructor(description: ChunkWriterDescription, lane: string, store?: Store) {
    const { secrets, chunkBytes, compression, run, known, wanted, counters } = description;
    this.#secrets = new Secrets(secrets);
    this.#store = store ?? openStore(description.store, true);
    this.#claimer = new Claimer(this.#store, run, lane);
    this.#known = new SharedIdSet(known);
    this.#wanted = new SharedIdSet(wanted);
    this.#counters = new BigInt64Array(counters);
    this.#chunkBytes = chunkBytes;
    this.#patches = new ObjectMemory(maxPatchBytes(chunkBytes));
    this.#newEncoder = () => new ChunkEncoder(this.#secrets, chunkBytes, compression, this.#store.name);
  }

  /**
   * The chunk with this content is in the store afterwards, and stays there while the run is at work.
   * @param content must not change before the promise is fulfilled
   * @returns its id. @throws CowcatcherError IO, NO_SPACE
   */
  async write(content: Uint8Array): Promise<Uint8Array> {
    this.countRead(content.length);
    const id = this.idOf(content);
    const place = await this.placeFor(id);
    if (place !== undefined) await this.put(place, id, content);
    return id;
  }

  /** So many bytes of the disk have been read. */
  countRead(bytes: number): void {
    Atomics.add(this.#counters, CNT_READ_BYTES, BigInt(bytes));
  }

  /** The id of a chunk with this content. */
  idOf(content: Uint8Array): Uint8Array {
    return this.#secrets.chunkId(content);
  }

  /** Whether the object is there, and stays while the run is at work, as far as can be told without asking. */
  isKnown(id: Uint8Array): boolean {
    return this.#known.has(id);
  }

  /** Whether a backup has lost the whole chunk with this id. */
  isWanted(id: Uint8Array): boolean {
    return this.#wanted.has(id);
  }

  /** Whether any backup has lost a chunk. */
  get isAnyWanted(): boolean {
    return this.#wanted.size > 0;
  }

  /**
   * The object's name where it is not there: from now on one that stays if it is put, however late.
   * @returns undefined: it is there, and stays. @throws CowcatcherError IO
   */
  async placeFor(id: Uint8Array): Promise<string | undefined> {
    if (this.#known.has(id)) return undefined;
    const name = nameFor(id, await this.#claimer.claim(id), this.#store.name);
    if ((await this.#store.head(name)) === undefined) return name;
    this.#known.add(id);
    return undefined;
  }

  /** @param place of placeFor. @throws CowcatcherError IO, NO_SPACE */
  async put(place: string, id: Uint8Array, content: Uint8Array, kind: ChunkKind = "chunk"): Promise<void> {
    await this.#put(place, id, content, kind);
    this.#known.add(id);
  }

  /**
   * As `write`, for a chunk as a patch of one that is there (format/patch.ts).
   * @param content of the whole chunk. @returns the patch's id
   */
  writePatch(base: Uint8Array, blocks: Uint8Array, content: Uint8Array): Promise<Uint8Array> {
    return this.#patches.with(async (memory) => {
      const patch = encodePatch(memory, base, blocks, content, blockBytesOf(this.#chunkBytes));
      const id = this.#secrets.patchId(patch);
      const place = await this.placeFor(id);
      if (place !== undefined) await this.put(place, id, patch, "patch");
      return id;
    });
  }

  /** Looks at a whole chunk that is there (ChunkReader.peek). @throws CowcatcherError NOT_FOUND, FORMAT, IO */
  peek<Result>(id: Uint8Array, use: (content: Buffer) => Result): Promise<Result> {
    this.#reader ??= new ChunkReader(this.#store, this.#secrets, this.#chunkBytes);
    return this.#reader.peek(id, use);
  }

  async #put(name: string, id: Uint8Array, content: Uint8Array, kind: ChunkKind): Promise<void> {
    const encoder = this.#idleEncoders.pop() ?? this.#newEncoder();
    try {
      const object = encoder.encode(id, content, kind);
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
    this.#reader?.close();
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
