// A metadata cluster in memory (an L2 table or a refcount block) and its way back to the file.
//
//   clean ──change──► dirty ──flush lends its bytes──► writing ──written──► clean (or dirty, if changed meanwhile)
//
// A flush writes the state of one instant. It borrows the bytes instead of copying them; the first change after
// that makes a copy for the changer (copy on write in memory). A table that is dirty or being written stays in
// memory. What changed is a byte range, so a flush writes little of a large cluster. Main thread only.

export interface LentTable {
  table: CachedTable;
  offsetBytes: number;
  bytes: Uint8Array;
  first: number;
  end: number;
}

export class CachedTable {
  bytes: Uint8Array;
  view: DataView;
  /** Used since the clock hand passed. */
  isReferenced = true;
  isWriting = false;
  private isLent = false;
  private dirtyFirst = Number.MAX_SAFE_INTEGER;
  private dirtyEnd = 0;

  constructor(
    readonly index: number,
    public offsetBytes: number,
    bytes: Uint8Array,
  ) {
    this.bytes = bytes;
    this.view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  }

  get isDirty(): boolean {
    return this.dirtyEnd > 0;
  }

  get isPinned(): boolean {
    return this.dirtyEnd > 0 || this.isWriting;
  }

  /** To be called before bytes [first, end) change. */
  willChange(first: number, end: number): void {
    if (this.isLent) {
      this.bytes = this.bytes.slice();
      this.view = new DataView(this.bytes.buffer);
      this.isLent = false;
    }
    if (first < this.dirtyFirst) this.dirtyFirst = first;
    if (end > this.dirtyEnd) this.dirtyEnd = end;
  }

  markAllDirty(): void {
    this.willChange(0, this.bytes.length);
  }

  lend(): LentTable {
    const { offsetBytes, bytes, dirtyFirst, dirtyEnd } = this;
    this.isLent = true;
    this.isWriting = true;
    this.dirtyFirst = Number.MAX_SAFE_INTEGER;
    this.dirtyEnd = 0;
    return { table: this, offsetBytes, bytes, first: dirtyFirst, end: dirtyEnd };
  }

  /** The flush is over; `isWritten` says whether what it borrowed is in the file. */
  takeBack(lent: LentTable, isWritten: boolean): void {
    if (this.bytes === lent.bytes) this.isLent = false;
    this.isWriting = false;
    if (isWritten) return;
    this.dirtyFirst = Math.min(this.dirtyFirst, lent.first);
    this.dirtyEnd = Math.max(this.dirtyEnd, lent.end);
  }
}

/**
 * CachedTables by index, at most `capacity` but for pinned ones. Eviction is the clock algorithm over insertion
 * order: a look-up only sets a bit.
 */
export class TableCache {
  private readonly tables = new Map<number, CachedTable>();
  private readonly dirty = new Set<CachedTable>();
  private last: CachedTable | undefined;

  constructor(readonly capacity: number) {}

  get dirtyCount(): number {
    return this.dirty.size;
  }

  get(index: number): CachedTable | undefined {
    if (this.last !== undefined && this.last.index === index) return this.last;
    const table = this.tables.get(index);
    if (table === undefined) return undefined;
    table.isReferenced = true;
    this.last = table;
    return table;
  }

  put(table: CachedTable): void {
    this.makeRoom();
    this.tables.set(table.index, table);
    this.last = table;
  }

  willChange(table: CachedTable, first: number, end: number): void {
    if (!table.isDirty) this.dirty.add(table);
    table.willChange(first, end);
  }

  dirtyTables(): readonly CachedTable[] {
    return [...this.dirty];
  }

  /** Tables whose state in memory is newer than, or not surely in, the file. */
  pinnedTables(): CachedTable[] {
    const pinned: CachedTable[] = [];
    for (const table of this.tables.values()) if (table.isPinned) pinned.push(table);
    return pinned;
  }

  lendDirty(): LentTable[] {
    const lent: LentTable[] = [];
    for (const table of this.dirty) lent.push(table.lend());
    this.dirty.clear();
    return lent;
  }

  takeBack(lent: readonly LentTable[], isWritten: boolean): void {
    for (const item of lent) {
      item.table.takeBack(item, isWritten);
      if (item.table.isDirty) this.dirty.add(item.table);
    }
  }

  private makeRoom(): void {
    // Twice round at most: the first round clears the bits, the second finds a victim unless all are pinned.
    for (let steps = this.tables.size * 2; this.tables.size >= this.capacity && steps > 0; steps--) {
      const oldest = this.tables.values().next();
      if (oldest.done) return;
      const table = oldest.value;
      this.tables.delete(table.index);
      if (table.isPinned || table.isReferenced) {
        table.isReferenced = false;
        this.tables.set(table.index, table);
      } else if (this.last === table) this.last = undefined;
    }
  }
}
