// The disks that `serve` has open and the jobs on them: the engine's side of JobHost. Main thread.

import { DiskNode } from "../cow/disk-node.js";
import { CowcatcherError } from "../errors.js";
import type { NbdPlace } from "../nbd/place.js";
import { BufferStore } from "./buffer-store.js";
import { CopyThreads } from "./copy-threads.js";
import type { BackupJob, BackupRequest, DiskInfo, JobHost, JobStatus, JobStatusListener } from "./host.js";
import type { HostedJob } from "./hosted-job.js";
import { LiveJob } from "./live-job.js";
import type { SnapshotPublisher } from "./snapshot.js";
import { SnapshotJob } from "./snapshot-job.js";
import { TableStore } from "./table-store.js";
import { type TargetClaim, TargetClaims } from "./target-claims.js";
import type { InUse } from "./target-guard.js";

/** A machine has a handful of disks; more jobs at once than this is a runaway script. */
const MAX_JOBS = 64;

export class LiveHost implements JobHost {
  readonly #nodes: ReadonlyMap<string, DiskNode>;
  readonly #jobs = new Map<string, HostedJob>();
  /** Ids and disks of jobs that are being prepared. */
  readonly #reserved = new Set<string>();
  readonly #listeners = new Set<JobStatusListener>();
  readonly #buffers = new BufferStore();
  readonly #tables = new TableStore();
  readonly #threads = new CopyThreads();
  readonly #targets = new TargetClaims();
  #places: readonly NbdPlace[] = [];
  readonly #onQuit: () => void;
  readonly #publisher: SnapshotPublisher | undefined;
  #closing = false;

  /** @param publisher who exports T0 views; without one, jobs that offer one are refused. */
  constructor(nodes: ReadonlyMap<string, DiskNode>, onQuit: () => void, publisher?: SnapshotPublisher) {
    this.#nodes = nodes;
    this.#onQuit = onQuit;
    this.#publisher = publisher;
    process.on("exit", this.#atExit);
  }

  /** Tells where this process serves its disks: an export of its own is no target. */
  listensAt(places: readonly NbdPlace[]): void {
    this.#places = places;
  }

  disks(): readonly DiskInfo[] {
    return [...this.#nodes.values()].map(({ nodeName, image }) => ({
      name: nodeName,
      path: image.path,
      format: image.format,
      sizeBytes: image.sizeBytes,
      readOnly: image.readOnly,
    }));
  }

  jobs(): readonly BackupJob[] {
    return [...this.#jobs.values()];
  }

  async startBackups(requests: readonly BackupRequest[]): Promise<readonly BackupJob[]> {
    const reservations = this.#reserve(requests);
    const prepared: HostedJob[] = [];
    const claims: TargetClaim[] = [];
    try {
      for (const request of requests) claims.push(await this.#targets.claim(request, this.#inUseBy(request)));
      for (const { id, disk, options } of requests) {
        const Job = options.sync === "none" ? SnapshotJob : LiveJob;
        prepared.push(
          await Job.prepare({
            id,
            node: this.#node(disk),
            options,
            buffers: this.#buffers,
            tables: this.#tables,
            threads: this.#threads,
            publisher: this.#publisher,
            onStatus: (job, status) => this.#changed(job, status),
          }),
        );
      }
      const nodes = requests.map(({ disk }) => this.#node(disk));
      const step = (): void => {
        this.#refuseIfClosing();
        for (const job of prepared) job.checkReady();
        for (const job of prepared) this.#jobs.set(job.id, job);
        for (const job of prepared) this.#changed(job, "created");
        for (const job of prepared) job.start();
      };
      const limitMs = Math.min(...requests.map(({ options }) => options.guestTimeoutMs));
      await DiskNode.quiesceAll(nodes, step, limitMs);
      for (const [index, job] of prepared.entries()) void job.concluded.then(() => claims[index]?.release());
      return prepared;
    } catch (error) {
      for (const job of prepared) job.cancel();
      await Promise.all(prepared.map((job) => this.#undo(job)));
      await Promise.all(claims.map((claim) => claim.release()));
      throw error;
    } finally {
      for (const name of reservations) this.#reserved.delete(name);
    }
  }

  /** What the target must not be, nor be built on. */
  #inUseBy({ disk }: BackupRequest): InUse {
    const images = [...this.#nodes].map(([name, { image }]) => ({ image, isSource: name === disk }));
    return { images, listeners: this.#places };
  }

  /** One of the group could not start: the others, started or not, end without a trace. */
  async #undo(job: HostedJob): Promise<void> {
    if (job.status !== "created") {
      await job.concluded;
      this.dismiss(job.id);
      return;
    }
    this.#jobs.delete(job.id);
    await job.abandon();
  }

  /** Takes the ids and disks, so that two requests that are prepared side by side cannot have the same. */
  #reserve(requests: readonly BackupRequest[]): string[] {
    this.#refuseIfClosing();
    const names: string[] = [];
    try {
      for (const { id, disk } of requests) {
        this.#node(disk);
        this.#reserveOne(`id ${id}`, names, this.#jobs.has(id), id, "a job with this id is there already");
        const running = [...this.#jobs.values()].some((job) => job.disk === disk && isActive(job.status));
        this.#reserveOne(`disk ${disk}`, names, running, disk, "the disk has a backup running already");
      }
      if (this.#jobs.size + requests.length > MAX_JOBS) {
        throw new CowcatcherError({
          code: "LIMIT",
          object: "jobs",
          problem: `more than ${MAX_JOBS} jobs`,
          hint: "dismiss those that have concluded",
        });
      }
      return names;
    } catch (error) {
      for (const name of names) this.#reserved.delete(name);
      throw error;
    }
  }

  #reserveOne(name: string, names: string[], taken: boolean, object: string, problem: string): void {
    if (taken || this.#reserved.has(name)) throw new CowcatcherError({ code: "BUSY", object, problem });
    this.#reserved.add(name);
    names.push(name);
  }

  #refuseIfClosing(): void {
    if (this.#closing) {
      throw new CowcatcherError({ code: "BUSY", object: "serve", problem: "the server is ending" });
    }
  }

  #node(disk: string): DiskNode {
    const node = this.#nodes.get(disk);
    if (node !== undefined) return node;
    throw new CowcatcherError({
      code: "NOT_FOUND",
      object: disk,
      problem: "no such disk is served",
      hint: `there are: ${[...this.#nodes.keys()].join(", ")}`,
    });
  }

  #changed(job: BackupJob, status: JobStatus): void {
    for (const listener of this.#listeners) listener(job, status);
  }

  dismiss(id: string): void {
    const job = this.#jobs.get(id);
    if (job === undefined || isActive(job.status)) return;
    this.#jobs.delete(id);
    job.dismiss();
  }

  onStatus(listener: JobStatusListener): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  quit(): void {
    this.#onQuit();
  }

  /** Cancels what runs and waits until its targets are removed. New jobs are refused from now on. */
  async close(): Promise<void> {
    this.#closing = true;
    const jobs = [...this.#jobs.values()];
    for (const job of jobs) job.cancel();
    await Promise.all(jobs.filter((job) => isActive(job.status)).map((job) => job.concluded));
    this.#threads.close();
    process.removeListener("exit", this.#atExit);
  }

  readonly #atExit = (): void => {
    for (const job of this.#jobs.values()) if (isActive(job.status)) job.abortSync();
  };
}

function isActive(status: JobStatus): boolean {
  return status !== "concluded" && status !== "null";
}
