// What a method does, by steps that both have: who keeps a disk's old data, and what is done to QEMU before T0, at T0 and
// after it. Main thread.

import type { JobOptions } from "../backup/options.js";
import { RemoteTarget } from "../backup/storage/remote-target.js";
import type { StorageHand } from "../backup/storage/protocol.js";
import { isRbdAddress } from "../rbd/address.js";
import { createTarget } from "../target/create.js";
import { NULL_TARGET_PATH } from "../target/null.js";
import type { Target, TargetOptions } from "../target/target.js";
import { FleeceKeeper } from "./fleece-keeper.js";
import { addFleeceNodes, exportSnapshots, type FilteredDisk, insertFilters } from "./filter.js";
import type { QemuDisk } from "./graph.js";
import type { Keeper } from "./keeper.js";
import type { MethodChoice } from "./method.js";
import type { Visit } from "./monitor.js";
import { partName } from "./names.js";
import { addRingNodes, exportDisks, startRingJobs } from "./ring.js";
import { RingHost, RingKeeper } from "./ring-keeper.js";
import type { RunFolder } from "./run-folder.js";
import type { GraphDisk, GuestPolicy, T0Times } from "./t0.js";

export type KeptDisk = GraphDisk & { readonly keeper: Keeper };

export interface MethodSteps {
  /** Before anything else. @throws CowcatcherError */
  open(): Promise<void>;
  makeTarget(options: TargetOptions): Promise<Target>;
  makeKeeper(disk: QemuDisk, index: number, job: JobOptions, target: Target): Keeper;
  /** What of QEMU's is in nobody's way. Of these three what fails is the caller's to undo. */
  prepare(visit: Visit, disks: readonly KeptDisk[]): Promise<void>;
  takeT0(visit: Visit, disks: readonly KeptDisk[], policy: GuestPolicy): Promise<T0Times>;
  /** Exports what is to be read. */
  publish(visit: Visit, disks: readonly KeptDisk[]): Promise<void>;
  /** The guest is harmed if we hang up before QEMU has let go. */
  readonly mustLetGo: boolean;
  /** When QEMU is as it was. Never rejects. */
  close(): Promise<void>;
}

export function stepsOf({ method }: MethodChoice, folder: RunFolder, signal: AbortSignal): MethodSteps {
  return method === "filter" ? new FilterSteps(folder) : new RingSteps(folder, signal);
}

class FilterSteps implements MethodSteps {
  readonly mustLetGo = false;
  readonly #folder: RunFolder;
  readonly #paths = new Map<number, string>();

  constructor(folder: RunFolder) {
    this.#folder = folder;
  }

  open(): Promise<void> {
    return Promise.resolve();
  }

  makeTarget(options: TargetOptions): Promise<Target> {
    return createTarget(options);
  }

  makeKeeper(disk: QemuDisk, index: number, job: JobOptions): Keeper {
    const keeper = new FleeceKeeper(this.#folder, index, disk, job);
    this.#paths.set(index, keeper.fleece.path);
    return keeper;
  }

  #filtered(disks: readonly KeptDisk[]): FilteredDisk[] {
    return disks.map(({ disk, index, undo, bitmap }) => {
      return { disk, index, undo, bitmap, fleecePath: this.#paths.get(index) ?? "" };
    });
  }

  prepare(visit: Visit, disks: readonly KeptDisk[]): Promise<void> {
    return addFleeceNodes(visit, this.#folder.run, this.#filtered(disks));
  }

  takeT0(visit: Visit, disks: readonly KeptDisk[], policy: GuestPolicy): Promise<T0Times> {
    return insertFilters(visit, this.#folder.run, this.#filtered(disks), policy);
  }

  publish(visit: Visit, disks: readonly KeptDisk[]): Promise<void> {
    return exportSnapshots(visit, this.#folder.run, this.#filtered(disks));
  }

  close(): Promise<void> {
    return Promise.resolve();
  }
}

class RingSteps implements MethodSteps {
  readonly mustLetGo = true;
  readonly #folder: RunFolder;
  readonly #signal: AbortSignal;
  readonly #host = new RingHost();
  readonly #hands: StorageHand[] = [];

  constructor(folder: RunFolder, signal: AbortSignal) {
    this.#folder = folder;
    this.#signal = signal;
  }

  open(): Promise<void> {
    return this.#host.listen(this.#folder);
  }

  /** The guest's writes pass through this thread: it does not touch the target's storage. */
  makeTarget(options: TargetOptions): Promise<Target> {
    if (options.path === NULL_TARGET_PATH || isRbdAddress(options.path)) return createTarget(options);
    const hand = this.#host.hands.take();
    this.#hands.push(hand);
    const sent = { ...options };
    // A function does not cross to another thread; the signal does its office.
    delete sent.isCancelled;
    return RemoteTarget.make(hand, sent, this.#signal);
  }

  makeKeeper(disk: QemuDisk, index: number, job: JobOptions, target: Target): Keeper {
    const name = partName(this.#folder.run, index, "nbd");
    return new RingKeeper(this.#host, name, disk, { ...job, spillDir: this.#folder.directory }, target);
  }

  prepare(visit: Visit, disks: readonly KeptDisk[]): Promise<void> {
    return addRingNodes(visit, this.#folder.run, disks, this.#folder.ringSocket);
  }

  takeT0(visit: Visit, disks: readonly KeptDisk[], policy: GuestPolicy): Promise<T0Times> {
    return startRingJobs(visit, this.#folder.run, disks, policy);
  }

  publish(visit: Visit, disks: readonly KeptDisk[]): Promise<void> {
    return exportDisks(visit, this.#folder.run, disks);
  }

  async close(): Promise<void> {
    for (const hand of this.#hands) hand.release();
    await this.#host.close();
  }
}
