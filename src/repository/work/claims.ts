// Backups and prune at the same time, from any number of machines, without a lock that one waits for: the claims.
//
// A chunk is deleted by whoever prunes if no backup refers to it; and a backup that runs meanwhile must never come to
// refer to a chunk that is being deleted. Neither can be told in one step by a store that knows put, get, list and
// delete. So each side announces what it is about to do, and only then looks what the others have announced
// (Dekker's way, which needs no more than that a call that was answered has happened):
//
//   backup                                        prune (condemned.ts)
//   b1  put its claim on chunk c                  p1  put the list of what it condemns, with c
//   b2  list what is condemned                    p2  read the claims of all runs that are not dead
//   b3  c is not on a list: rely on the object    p3  read the manifests that have come since
//       c if it is there, else put it             p4  delete c unless p2 or p3 have it
//       c is on a list: use the name c.1, …       p5  delete the list
//   b4  put the indexes, then the manifest
//   b5  delete its claims
//
// Nobody waits. Why no manifest ever refers to a chunk that is gone. Say that one does: that backup relied on the
// object c (b3), and prune deleted it afterwards (p4). If p1 came before b2, then either the list was still there, so the
// backup saw it and used another name; or p5 came before b2, so the deletion before b3, whereupon the backup found c
// missing and put it. If p1 came after b2, so after b1, then at p2 either the claim was there, and c was spared; or b5 had
// come, so b4, and p3 found the manifest: c was spared. Each case contradicts.
//
// A name c.1 is as good as c: readers look for it where c is missing. It is how a backup goes on at once where it would
// have to wait for a prune that may have died.
//
// The dead. A backup that was killed leaves claims, which must end one day. But whoever is taken for dead may only be
// slow, and a store cannot keep him from writing. So a judge J declares a run R dead in two steps, and R looks once more when it has
// its manifest in place:
//
//   judge J                                       run R
//   j1  put R.revoked-J                           r1  put its draft: which manifest it will write
//   j2  does the manifest of R's draft exist?     r2  put the manifest (b4)
//       yes: it is complete; delete R.revoked-J   r3  is there an R.revoked-… or R.dead? Then delete the manifest and
//       no draft and no record: R has ended;          fail. Else the backup is good.
//            delete R.revoked-J                   r4  delete the claims (b5), then the record, then the draft
//       else: put R.dead, delete R.revoked-J
//   j3  delete R's claims
//
// A manifest whose run is dead is void: no reader takes it for a backup, and prune deletes it. Why a backup that was
// reported as good is never void: R found no R.revoked-J at r3, so j1 came after r3 (or R.revoked-J had been deleted, and
// then R.dead was there, or J had found R's manifest). If j1 came after r3, it came after r2, so at j2 J found the manifest;
// or no draft, as r4 had come, and then no record either. A listing that is under way at j2 may miss R.revoked-J, which goes,
// and R.dead, which comes before that: so at r3 R lists, and then asks for R.dead by its name.
// Each judge has a R.revoked of its own, as one that withdraws his must not withdraw another's. If J dies between his steps, R
// fails though it need not, and nothing else.
//
// Deletions that come late. Prune deletes its list (p5) when all deletions are answered. If it dies, its list stays
// (condemned.ts says for how long), and backups keep off those names.
//
// What it costs: a backup puts a claim for the chunks that its lanes have in hand, some at a time, and lists the few
// objects under locks/ once for each; what it takes over from the backup before it is claimed at once at the start.

import type { Generation } from "../format/names.js";
import { isNotFound, type Store } from "../store/store.js";
import { decodeIdList, encodeIdList, type ListedChunk, MAX_LIST_BYTES, MAX_LIST_ENTRIES } from "./id-list.js";
import { claimsOf, readLocks } from "./runs.js";

/** What was on a list of condemned chunks when somebody looked, after his claim. */
export class Condemned {
  /** By the object that lists them; the lists never change. */
  readonly #lists = new Map<string, ReadonlySet<string>>();

  isCondemned(id: Uint8Array, generation: Generation): boolean {
    const key = keyOf({ id, generation });
    for (const list of this.#lists.values()) if (list.has(key)) return true;
    return false;
  }

  /** Looks anew. @throws CowcatcherError FORMAT for a list that cannot be read: what is on it cannot be known. */
  async refresh(store: Store): Promise<void> {
    const names = (await readLocks(store)).filter(({ kind }) => kind === "condemned").map(({ name }) => name);
    for (const known of this.#lists.keys()) if (!names.includes(known)) this.#lists.delete(known);
    for (const name of names) {
      if (this.#lists.has(name)) continue;
      try {
        const chunks = decodeIdList(store.name, name, await store.get(name, MAX_LIST_BYTES));
        this.#lists.set(name, new Set(chunks.map(keyOf)));
      } catch (error) {
        // Its deletions are done, before whatever the caller does next.
        if (!isNotFound(error)) throw error;
      }
    }
  }
}

function keyOf({ id, generation }: ListedChunk): string {
  return `${Buffer.from(id.buffer, id.byteOffset, id.length).toString("latin1")}${generation}`;
}

/**
 * The claims of one thread of a backup. Those who ask while a claim is on its way share the next one.
 */
export class Claimer {
  readonly #store: Store;
  readonly #prefix: string;
  readonly #condemned = new Condemned();
  #count = 0;
  #waiting: { id: Uint8Array; resolve: (condemned: Condemned) => void; reject: (error: unknown) => void }[] =
    [];
  #isBusy = false;

  /** @param lane tells this thread's claims from those of the run's others */
  constructor(store: Store, run: string, lane: string) {
    this.#store = store;
    this.#prefix = `${claimsOf(run)}${lane}-`;
  }

  /** b1 and b2 for one chunk. The answer holds until the caller's next turn of the event loop and beyond. */
  claim(id: Uint8Array): Promise<Condemned> {
    return new Promise((resolve, reject) => {
      this.#waiting.push({ id, resolve, reject });
      if (!this.#isBusy) void this.#serve();
    });
  }

  async #serve(): Promise<void> {
    this.#isBusy = true;
    while (this.#waiting.length > 0) {
      const batch = this.#waiting.splice(0, MAX_LIST_ENTRIES);
      try {
        await this.#put(batch.map(({ id }) => ({ id, generation: 0 })));
        await this.#condemned.refresh(this.#store);
        for (const { resolve } of batch) resolve(this.#condemned);
      } catch (error) {
        for (const { reject } of batch) reject(error);
      }
    }
    this.#isBusy = false;
  }

  /** b1 and b2 for many, 32 bytes each. */
  async claimAll(ids: Iterable<Uint8Array>): Promise<Condemned> {
    let batch: ListedChunk[] = [];
    for (const id of ids) {
      batch.push({ id, generation: 0 });
      if (batch.length < MAX_LIST_ENTRIES) continue;
      await this.#put(batch);
      batch = [];
    }
    if (batch.length > 0) await this.#put(batch);
    await this.#condemned.refresh(this.#store);
    return this.#condemned;
  }

  /** A claim need not outlive its run, which a loss of power ends. */
  async #put(chunks: readonly ListedChunk[]): Promise<void> {
    await this.#store.put(`${this.#prefix}${this.#count++}`, encodeIdList(chunks), { durable: false });
  }
}
