// Backups on their way into repositories, on a storage thread: the sessions themselves, and what the main thread asks of
// them. The store is spoken to from here and from the copying threads alone.

import { CowcatcherError } from "../../errors.js";
import { BackupSession, type SessionDisk, takeable } from "../../repository/backup/session.js";
import type { KeySource } from "../../repository/format/keys.js";
import { environmentKey, keyFromFile, passphraseFromFile } from "../../repository/key-files.js";
import { Repository } from "../../repository/repository.js";
import { RepositoryTarget } from "../../target/repository/target.js";
import type { Target } from "../../target/target.js";
import type { ArgumentOf, BegunSession, SessionPlace } from "./protocol.js";

interface OpenSession {
  repository: Repository;
  session: BackupSession;
  disks: Map<string, { disk: SessionDisk; basis: ReturnType<typeof takeable> }>;
}

export class RepositorySessions {
  readonly #sessions = new Map<number, OpenSession>();
  #lastId = 0;

  /** @throws CowcatcherError as Repository.open and BackupSession.begin; nothing is left then. */
  async begin(place: SessionPlace): Promise<BegunSession> {
    const repository = await Repository.open(place.address, () => Promise.resolve(keyOf(place)), true);
    let session: BackupSession;
    try {
      session = await BackupSession.begin(repository, place);
    } catch (error) {
      repository.close();
      throw error;
    }
    const id = ++this.#lastId;
    this.#sessions.set(id, { repository, session, disks: new Map() });
    const last = session.parent?.manifest;
    return {
      id,
      repositoryId: repository.config.id,
      chunkBytes: repository.config.chunkBytes,
      parent: last === undefined ? null : { time: last.time, checkpoint: last.checkpoint },
    };
  }

  /** @throws CowcatcherError as BackupSession.addDisk */
  addDisk({ session: id, disk: name, sizeBytes, format }: ArgumentOf<"addSessionDisk">): {
    target: Target;
    takeable: Uint8Array | null;
  } {
    const { session, disks } = this.#session(id);
    const disk = session.addDisk(name, sizeBytes, format);
    const basis = takeable(session, disk);
    disks.set(name, { disk, basis });
    const target = new RepositoryTarget(disk, "side-by-side");
    if (basis === undefined) return { target, takeable: null };
    const there = new Uint8Array(disk.chunkCount);
    for (let chunk = 0; chunk < disk.chunkCount; chunk++) there[chunk] = Number(basis.isThere(chunk));
    return { target, takeable: there };
  }

  setLevel({ session: id, disk: name, level, reason }: ArgumentOf<"setSessionLevel">): void {
    const { session, disks } = this.#session(id);
    session.setLevel(level, reason);
    const found = disks.get(name);
    if (level === "incremental" && found?.basis !== undefined) found.disk.takeOver(found.basis.index);
  }

  start({ session: id, ns }: ArgumentOf<"startSession">): { time: string; clockBehind?: string } {
    const { session } = this.#session(id);
    session.started(ns);
    const { backup, clockBehind } = session;
    return { time: backup.time, ...(clockBehind !== undefined && { clockBehind }) };
  }

  /** Never rejects. */
  async end(id: number): Promise<void> {
    const open = this.#sessions.get(id);
    this.#sessions.delete(id);
    if (open === undefined) return;
    const { repository, session } = open;
    await session.abort(
      new CowcatcherError({ code: "CANCELLED", object: repository.name, problem: "the backup was given up" }),
    );
    repository.close();
  }

  #session(id: number): OpenSession {
    const open = this.#sessions.get(id);
    if (open !== undefined) return open;
    throw new CowcatcherError({
      code: "INTERNAL",
      object: "repository",
      problem: `there is no session ${id}`,
    });
  }
}

function keyOf({ keyFile, passphraseFile }: SessionPlace): KeySource | undefined {
  if (keyFile !== undefined) return keyFromFile(keyFile);
  if (passphraseFile !== undefined) return passphraseFromFile(passphraseFile);
  return environmentKey(process.env);
}
