// What becomes of a disk's dirty bitmaps at a T0: added, cleared, enabled, disabled, merged, removed, all of them in one
// step. Main thread.
//
// A bitmap's bits at T0 are known only then, so what is to be merged or kept is followed up to it (DiskTracker.follow);
// they are written afterwards. A change that was made can be undone until all of the start's are.

import type { DiskNode } from "../../cow/disk-node.js";
import { Bits } from "../../tracking/bits.js";
import type { MadeChange, NameChange } from "../../tracking/epoch-store.js";
import type { DiskTracker, Following, FrozenEpoch } from "../../tracking/tracker.js";
import type { MarkRequest } from "../host.js";
import type { StartMark } from "./start.js";

export interface MarkedDisk {
  node: DiskNode;
  tracker: DiskTracker;
}

interface Change {
  request: MarkRequest;
  sources: readonly Following[];
  kept?: Bits;
}

export class CheckpointMark implements StartMark {
  readonly nodes: readonly DiskNode[];
  readonly #disk: MarkedDisk;
  readonly #sources: ReadonlyMap<string, MarkedDisk>;
  readonly #requests: readonly MarkRequest[];
  readonly #uuid: string;
  #changes: Change[] = [];
  readonly #epochs: FrozenEpoch[] = [];
  #epoch: FrozenEpoch | undefined;
  #made: MadeChange | undefined;
  #t0Ms = 0;

  /**
   * @param requests of one disk
   * @param diskOf the disks of what it is to hold
   * @param uuid of all checkpoints of the start
   */
  constructor(
    disk: MarkedDisk,
    requests: readonly MarkRequest[],
    diskOf: (name: string) => MarkedDisk,
    uuid: string,
  ) {
    this.#disk = disk;
    this.#requests = requests;
    this.#uuid = uuid;
    const names = new Set(requests.flatMap(({ holds }) => holds.map((held) => held.disk)));
    this.#sources = new Map([...names].map((name) => [name, diskOf(name)]));
    this.nodes = [disk.node, ...[...this.#sources.values()].map(({ node }) => node)];
  }

  get #trackers(): Set<DiskTracker> {
    return new Set([this.#disk.tracker, ...[...this.#sources.values()].map(({ tracker }) => tracker)]);
  }

  async beforeT0(): Promise<void> {
    for (const tracker of this.#trackers) await tracker.prepareFreeze();
    for (const request of this.#requests) {
      const change = { request, sources: [] as Following[] };
      this.#changes.push(change);
      for (const [name, { tracker }] of this.#sources) {
        const held = request.holds.filter(({ disk }) => disk === name);
        if (held.length > 0) change.sources.push(await tracker.follow(...held.map((bitmap) => bitmap.name)));
      }
    }
  }

  atT0(t0Ms: number): void {
    this.#t0Ms = t0Ms;
    for (const tracker of this.#trackers) {
      const epoch = tracker.freeze();
      this.#epochs.push(epoch);
      if (tracker === this.#disk.tracker) this.#epoch = epoch;
    }
    for (const change of this.#changes) {
      if (change.sources.length === 0) continue;
      const { sizeBytes, granularityBytes } = this.#disk.tracker;
      change.kept = new Bits(sizeBytes, granularityBytes);
      for (const source of change.sources) {
        change.kept.or(source.known);
        change.kept.or(source.late());
      }
    }
  }

  /** After the last call but undo() and done(): nothing more is followed. */
  abandon(): void {
    for (const epoch of this.#epochs.splice(0)) epoch.release();
    for (const { sources } of this.#changes) for (const source of sources) source.end();
    this.#changes = [];
  }

  /** After T0: durable once it is fulfilled. @throws CowcatcherError LIMIT, IO, NO_SPACE; the tracking's failure. */
  async commit(): Promise<void> {
    const epoch = this.#epoch;
    try {
      if (epoch === undefined) return;
      const changes = this.#changes.map((change): NameChange => this.#nameChange(change, epoch));
      this.#made = await this.#disk.tracker.change(changes);
    } finally {
      this.abandon();
    }
  }

  #nameChange({ request, kept }: Change, { epoch }: FrozenEpoch): NameChange {
    const { name, isRecording, isRemoved } = request;
    if (isRemoved === true) return { name, to: undefined };
    const to = { name, uuid: this.#uuid, epoch, createdMs: this.#t0Ms };
    return { name, kept, to: isRecording ? to : { ...to, isStopped: true } };
  }

  /** Something else of the start has failed. @throws CowcatcherError IO, NO_SPACE */
  async undo(): Promise<void> {
    await this.#made?.undo();
  }

  async done(): Promise<void> {
    await this.#made?.done();
  }
}
