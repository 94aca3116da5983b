// A disk of a backup in a repository, as a target. Its unit is the chunk: a worker's write is a whole one, or the last
// of the disk. On the session's thread.

import { CowcatcherError } from "../../errors.js";
import type { SessionDisk } from "../../repository/backup/session.js";
import type { RepositoryTargetDescription, Target } from "../target.js";

export class RepositoryTarget implements Target {
  readonly name: string;
  readonly granularityBytes: number;
  readonly description: RepositoryTargetDescription;
  /** Each chunk is checked when it is read; `repo verify` reads them all. */
  readonly unfinishedPath = null;
  /** Of several disks that are copied side by side: the other ones are waited for, so a cancel may come meanwhile. */
  readonly commitWaits: boolean;
  readonly #disk: SessionDisk;
  #isDone = false;

  /** @param side disks of the backup are copied one after another, or all at a time */
  constructor(disk: SessionDisk, side: "in-turn" | "side-by-side" = "in-turn") {
    this.commitWaits = side === "side-by-side";
    const { session, name, sizeBytes, chunkBytes, ids, states, patching, counters } = disk;
    const writer = session.writerDescription(counters);
    this.#disk = disk;
    this.name = `${session.repository.name}::${name}`;
    this.granularityBytes = chunkBytes;
    this.description = {
      format: "repository",
      name: this.name,
      sizeBytes,
      chunkBytes,
      ids,
      states,
      patching,
      writer,
      isRemote: writer.store.kind === "s3",
      direct: false,
    };
  }

  started(): void {
    this.#disk.session.started();
  }

  complete(): Promise<void> {
    return this.#disk.session.putIndex(this.#disk);
  }

  async commit(): Promise<void> {
    const { session } = this.#disk;
    await session.diskDone();
    if (this.commitWaits) await session.completed;
    this.#isDone = true;
  }

  async finish(): Promise<void> {
    await this.complete();
    await this.commit();
  }

  /** The whole backup goes with one of its disks. */
  async abort(): Promise<void> {
    if (this.#isDone) return;
    await this.#disk.session.abort(
      new CowcatcherError({ code: "CANCELLED", object: this.name, problem: "the backup was given up" }),
    );
  }

  abortSync(): void {
    // Nothing that was stored shows, and prune finds it.
  }
}
