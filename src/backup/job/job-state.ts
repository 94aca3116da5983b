// What every job of a server has: its id, options and speed, its status and who is told of it, and its end.

import type { CowcatcherError } from "../../errors.js";
import type { JobStatus } from "../host.js";
import type { JobOptions } from "../options.js";
import type { HostedJob, HostedJobParts } from "./hosted-job.js";

/** Main thread only. */
export abstract class JobState {
  readonly id: string;
  readonly disk: string;
  readonly options: JobOptions;
  status: JobStatus = "created";
  error: CowcatcherError | undefined;
  /** The instant that the backup shows, in milliseconds since 1970 UTC. */
  t0Ms: number | undefined;
  /** Bytes a second to the target; 0: no limit. */
  speed: number;
  /** Fulfilled when the job is concluded and everything of it is cleaned up. */
  readonly concluded: Promise<void>;
  protected readonly parts: HostedJobParts;
  #markConcluded: () => void = () => {};

  constructor(parts: HostedJobParts) {
    this.id = parts.id;
    this.disk = parts.node.nodeName;
    this.options = parts.options;
    this.speed = parts.options.rateLimitBytes;
    this.parts = parts;
    this.concluded = new Promise((resolve) => {
      this.#markConcluded = resolve;
    });
  }

  /** The job has ended, one way or the other: nothing of it is left but what it says of itself. */
  protected get isOver(): boolean {
    return this.status === "concluded" || this.status === "null";
  }

  protected setStatus(this: this & HostedJob, status: JobStatus): void {
    this.status = status;
    this.parts.onStatus(this, status);
  }

  /** Everything of the job is cleaned up. */
  protected conclude(this: this & HostedJob): void {
    this.setStatus("concluded");
    this.#markConcluded();
  }

  /** Forgets the job: only JobHost.dismiss. */
  dismiss(this: this & HostedJob): void {
    this.setStatus("null");
  }
}
