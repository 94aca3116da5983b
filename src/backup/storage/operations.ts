// The storage thread's side of its calls: they are carried out here, and what they make is kept here.
//
// Each call blocks the thread (block/file/calls.ts), but those that await a server: another call may come between then.

import { CowcatcherError } from "../../errors.js";
import type { Image } from "../../block/device.js";
import { closeFile } from "../../block/file/calls.js";
import { readFully, writeFully } from "../../block/file/fileio.js";
import { createTarget } from "../../target/create.js";
import { freeInPieces } from "../../target/file/file.js";
import type { Target } from "../../target/target.js";
import { openBacking } from "../guard/backing-check.js";
import { placeOf, refuseImageAsTarget } from "../guard/target-guard.js";
import { openSpillFile } from "../memory/spill-file.js";
import type { ArgumentOf, MadeTarget, StorageCalls } from "./protocol.js";
import { RepositorySessions } from "./sessions.js";

const CANCELLED = 1;

export class StorageOperations implements StorageCalls {
  readonly #targets = new Map<number, Target>();
  readonly #backings = new Map<number, Image>();
  readonly #sessions = new RepositorySessions();
  #lastId = 0;

  async lookAtTarget({
    target,
    inUse,
  }: ArgumentOf<"lookAtTarget">): ReturnType<StorageCalls["lookAtTarget"]> {
    await refuseImageAsTarget(target, inUse);
    return placeOf(target);
  }

  async openBacking({ target, inUse }: ArgumentOf<"openBacking">): Promise<number | null> {
    const backing = await openBacking(target, inUse);
    if (backing === null) return null;
    this.#backings.set(++this.#lastId, backing);
    return this.#lastId;
  }

  async closeBacking(id: number): Promise<void> {
    const backing = this.#backings.get(id);
    this.#backings.delete(id);
    await backing?.close();
  }

  async makeTarget({ options, cancel }: ArgumentOf<"makeTarget">): Promise<MadeTarget> {
    const word = new Int32Array(cancel);
    const isCancelled = (): boolean => Atomics.load(word, 0) === CANCELLED;
    return this.#keep(await createTarget({ ...options, isCancelled }));
  }

  #keep(target: Target): MadeTarget {
    this.#targets.set(++this.#lastId, target);
    const { name, granularityBytes, description, workerLimit, unfinishedPath, temporaryPaths = [] } = target;
    return {
      id: this.#lastId,
      name,
      granularityBytes,
      description,
      workerLimit,
      awaitsWorkers: target.workersAreIn !== undefined,
      commitWaits: target.commitWaits === true,
      unfinishedPath,
      temporaryPaths,
    };
  }

  beginSession(place: ArgumentOf<"beginSession">): ReturnType<StorageCalls["beginSession"]> {
    return this.#sessions.begin(place);
  }

  async addSessionDisk(argument: ArgumentOf<"addSessionDisk">): ReturnType<StorageCalls["addSessionDisk"]> {
    const { target, takeable } = this.#sessions.addDisk(argument);
    return Promise.resolve({ ...this.#keep(target), takeable });
  }

  async setSessionLevel(argument: ArgumentOf<"setSessionLevel">): Promise<void> {
    this.#sessions.setLevel(argument);
    return Promise.resolve();
  }

  async startSession(argument: ArgumentOf<"startSession">): ReturnType<StorageCalls["startSession"]> {
    return Promise.resolve(this.#sessions.start(argument));
  }

  endSession(session: number): Promise<void> {
    return this.#sessions.end(session);
  }

  async workersAreIn(id: number): Promise<void> {
    await this.#targets.get(id)?.workersAreIn?.();
  }

  async completeTarget(id: number): Promise<void> {
    await this.#target(id).complete();
  }

  async commitTarget(id: number): Promise<void> {
    await this.#target(id).commit();
    this.#targets.delete(id);
  }

  async abortTarget(id: number): Promise<void> {
    await this.#targets.get(id)?.abort();
    this.#targets.delete(id);
  }

  openSpill({ spillDir, target }: ArgumentOf<"openSpill">): Promise<{ path: string; fd: number }> {
    return openSpillFile(spillDir, target);
  }

  async writeSpill(transfer: ArgumentOf<"writeSpill">): Promise<void> {
    const { fd, path, memory, memoryOffset, lengthBytes, offsetBytes } = transfer;
    await writeFully(path, fd, new Uint8Array(memory), memoryOffset, lengthBytes, offsetBytes);
  }

  async readSpill(transfer: ArgumentOf<"readSpill">): Promise<void> {
    const { fd, path, memory, memoryOffset, lengthBytes, offsetBytes } = transfer;
    const count = await readFully(path, fd, new Uint8Array(memory), memoryOffset, lengthBytes, offsetBytes);
    if (count === lengthBytes) return;
    throw new CowcatcherError({
      code: "IO",
      object: path,
      problem: "the spill file has lost what was written to it",
      offsetBytes: offsetBytes + count,
    });
  }

  async closeSpill(fd: number): Promise<void> {
    await freeInPieces(fd).catch(() => undefined);
    await closeFile(fd);
  }

  #target(id: number): Target {
    const target = this.#targets.get(id);
    if (target !== undefined) return target;
    throw new CowcatcherError({ code: "INTERNAL", object: "target", problem: `there is no target ${id}` });
  }
}
