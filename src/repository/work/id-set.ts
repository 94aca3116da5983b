// Sets of chunk ids: open addressing over one block of memory, 32 bytes an entry and a byte or a word of state. Ids
// are hashes, so their second four bytes say where an entry stands. (The first one is what prune's passes go by: within a pass
// it has few values.)

import { ID_BYTES } from "../format/secrets.js";

const FILLED = 1;
/** Of SharedIdSet: somebody copies an id into the entry. */
const FILLING = 2;

/** Of one thread; grows. 33 to 100 bytes an id. */
export class IdSet {
  #capacity: number;
  #ids: Uint8Array;
  #states: Uint8Array;
  #size = 0;

  constructor(expected = 0) {
    this.#capacity = capacityFor(expected);
    this.#ids = new Uint8Array(this.#capacity * ID_BYTES);
    this.#states = new Uint8Array(this.#capacity);
  }

  get size(): number {
    return this.#size;
  }

  /** @param at where the id begins in `ids`. @returns whether it was new */
  add(ids: Uint8Array, at = 0): boolean {
    if (this.#size * 3 >= this.#capacity * 2) this.#grow();
    const entry = this.#find(ids, at);
    if (this.#states[entry] === FILLED) return false;
    this.#states[entry] = FILLED;
    this.#ids.set(ids.subarray(at, at + ID_BYTES), entry * ID_BYTES);
    this.#size++;
    return true;
  }

  has(ids: Uint8Array, at = 0): boolean {
    return this.#states[this.#find(ids, at)] === FILLED;
  }

  *values(): Generator<Uint8Array, void, void> {
    for (let entry = 0; entry < this.#capacity; entry++) {
      if (this.#states[entry] === FILLED) yield this.#ids.subarray(entry * ID_BYTES, (entry + 1) * ID_BYTES);
    }
  }

  #find(ids: Uint8Array, at: number): number {
    let entry = placeOf(ids, at, this.#capacity);
    while (this.#states[entry] === FILLED && !isAt(this.#ids, entry, ids, at)) {
      entry = (entry + 1) & (this.#capacity - 1);
    }
    return entry;
  }

  #grow(): void {
    const oldIds = this.#ids;
    const oldStates = this.#states;
    this.#capacity *= 2;
    this.#ids = new Uint8Array(this.#capacity * ID_BYTES);
    this.#states = new Uint8Array(this.#capacity);
    this.#size = 0;
    for (let entry = 0; entry < oldStates.length; entry++) {
      if (oldStates[entry] === FILLED) this.add(oldIds, entry * ID_BYTES);
    }
  }
}

export interface SharedIdSetBuffers {
  ids: SharedArrayBuffer;
  states: SharedArrayBuffer;
  size: SharedArrayBuffer;
}

/**
 * Of all threads of a backup: the chunks that it may rely on. Never grows: an id that finds no place is simply not
 * known, and is looked for in the store again. The system gives memory as entries are filled.
 */
export class SharedIdSet {
  readonly #capacity: number;
  readonly #ids: Uint8Array;
  readonly #states: Int32Array;
  readonly #size: Int32Array;

  constructor(readonly buffers: SharedIdSetBuffers) {
    this.#ids = new Uint8Array(buffers.ids);
    this.#states = new Int32Array(buffers.states);
    this.#size = new Int32Array(buffers.size);
    this.#capacity = this.#states.length;
  }

  static create(expected: number): SharedIdSet {
    const capacity = capacityFor(expected);
    return new SharedIdSet({
      ids: new SharedArrayBuffer(capacity * ID_BYTES),
      states: new SharedArrayBuffer(capacity * 4),
      size: new SharedArrayBuffer(4),
    });
  }

  get size(): number {
    return Atomics.load(this.#size, 0);
  }

  add(ids: Uint8Array, at = 0): void {
    if (Atomics.load(this.#size, 0) * 3 >= this.#capacity * 2) return;
    let entry = placeOf(ids, at, this.#capacity);
    for (;;) {
      const state = Atomics.load(this.#states, entry);
      if (state === 0 && Atomics.compareExchange(this.#states, entry, 0, FILLING) === 0) break;
      if (Atomics.load(this.#states, entry) === FILLED && isAt(this.#ids, entry, ids, at)) return;
      // One that is being filled may be this id: it stands twice then, which does no harm.
      entry = (entry + 1) & (this.#capacity - 1);
    }
    this.#ids.set(ids.subarray(at, at + ID_BYTES), entry * ID_BYTES);
    Atomics.store(this.#states, entry, FILLED);
    Atomics.add(this.#size, 0, 1);
  }

  has(ids: Uint8Array, at = 0): boolean {
    let entry = placeOf(ids, at, this.#capacity);
    for (
      let state = Atomics.load(this.#states, entry);
      state !== 0;
      state = Atomics.load(this.#states, entry)
    ) {
      if (state === FILLED && isAt(this.#ids, entry, ids, at)) return true;
      entry = (entry + 1) & (this.#capacity - 1);
    }
    return false;
  }
}

function capacityFor(expected: number): number {
  let capacity = 1024;
  while (capacity * 2 < expected * 3 + 3) capacity *= 2;
  return capacity;
}

function placeOf(ids: Uint8Array, at: number, capacity: number): number {
  const word = ids[at + 4] | (ids[at + 5] << 8) | (ids[at + 6] << 16) | (ids[at + 7] << 24);
  return word & (capacity - 1);
}

function isAt(table: Uint8Array, entry: number, ids: Uint8Array, at: number): boolean {
  const base = entry * ID_BYTES;
  for (let i = 0; i < ID_BYTES; i++) if (table[base + i] !== ids[at + i]) return false;
  return true;
}
