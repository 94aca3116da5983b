// A JobHost whose jobs do what a test tells them, for the control socket's tests.
import { CowcatcherError } from "../../src/errors.js";
import type {
  BackupJob,
  BackupRequest,
  BitmapInfo,
  CheckpointInfo,
  DiskInfo,
  JobHost,
  MarkRequest,
  JobStatus,
  JobStatusListener,
} from "../../src/backup/host.js";
import type { JobOptions } from "../../src/backup/options.js";
import { type JobProgress, NO_PROGRESS as NOTHING_DONE } from "../../src/backup/progress.js";

export const NO_PROGRESS: JobProgress = { ...NOTHING_DONE, bytesTotal: 4096 };

export class FakeJob implements BackupJob {
  readonly id: string;
  readonly disk: string;
  readonly options: JobOptions;
  status: JobStatus = "created";
  error: CowcatcherError | undefined;
  speed: number;
  counters: JobProgress = { ...NO_PROGRESS };
  readonly #report: JobStatusListener;

  constructor({ id, disk, options }: BackupRequest, report: JobStatusListener) {
    this.id = id;
    this.disk = disk;
    this.options = options;
    this.speed = options.rateLimitBytes;
    this.#report = report;
  }

  to(...statuses: JobStatus[]): void {
    for (const status of statuses) {
      this.status = status;
      this.#report(this, status);
    }
  }

  succeed(): void {
    this.counters.bytesDone = this.counters.bytesTotal;
    this.to("waiting", "pending", "concluded");
  }

  fail(error: CowcatcherError): void {
    this.error = error;
    this.to("aborting", "concluded");
  }

  progress(): JobProgress {
    return { ...this.counters };
  }

  cancel(): void {
    this.fail(new CowcatcherError({ code: "CANCELLED", object: this.id, problem: "cancelled" }));
  }

  pause(): void {
    this.to("paused");
  }

  resume(): void {
    this.to("running");
  }

  setSpeed(bytesPerSecond: number): void {
    this.speed = bytesPerSecond;
  }
}

export class FakeJobHost implements JobHost {
  readonly diskList: DiskInfo[] = ["disk", "data"].map((name) => ({
    name,
    path: `/images/${name}.raw`,
    format: "raw",
    sizeBytes: 4096,
    readOnly: false,
    tracking: {
      mode: "host",
      state: "tracking",
      granularityBytes: 65_536,
      hotExtents: 0,
      logWaits: 0,
      lossReason: null,
      lostCheckpoints: [],
      checkpoints: [
        { name: "b0", uuid: "00000000-0000-4000-8000-000000000000", createdMs: 0, isStopped: false },
      ],
    },
  }));
  jobList: FakeJob[] = [];
  readonly listeners = new Set<JobStatusListener>();
  /** What startBackups was called with. */
  readonly starts: (readonly BackupRequest[])[] = [];
  /** Its marks. */
  readonly marks: MarkRequest[] = [];
  /** The next start rejects with it. */
  startError: CowcatcherError | undefined;
  /** Runs after each start, before it resolves. */
  afterStart: (jobs: FakeJob[]) => void = () => undefined;
  reportsNull = false;
  quitCount = 0;

  disks(): readonly DiskInfo[] {
    return this.diskList;
  }

  bitmaps(disk: string): Promise<readonly BitmapInfo[]> {
    const { tracking } = this.diskList.find(({ name }) => name === disk) ?? {};
    const base = { dirtyBytes: 0, isBusy: false, isInconsistent: false };
    const shown = ({ name, isStopped }: CheckpointInfo) => ({ ...base, name, isRecording: !isStopped });
    return Promise.resolve((tracking?.checkpoints ?? []).map(shown));
  }

  changedBytes(): Promise<number> {
    return Promise.resolve(0);
  }

  deleteCheckpoint(): Promise<void> {
    return Promise.resolve();
  }

  jobs(): readonly FakeJob[] {
    return this.jobList;
  }

  job(id: string): FakeJob {
    const found = this.jobList.find((job) => job.id === id);
    if (found === undefined) throw new Error(`the test has no job ${id}`);
    return found;
  }

  async startBackups(
    requests: readonly BackupRequest[],
    marks: readonly MarkRequest[] = [],
  ): Promise<readonly BackupJob[]> {
    this.starts.push(requests);
    this.marks.push(...marks);
    await Promise.resolve();
    if (this.startError !== undefined) throw this.startError;
    const jobs = requests.map((request) => new FakeJob(request, (job, status) => this.report(job, status)));
    this.jobList.push(...jobs);
    for (const job of jobs) job.to("created", "running");
    this.afterStart(jobs);
    return jobs;
  }

  dismiss(id: string): void {
    const job = this.job(id);
    this.jobList = this.jobList.filter((other) => other !== job);
    if (this.reportsNull) job.to("null");
  }

  onStatus(listener: JobStatusListener): () => void {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  quit(): void {
    this.quitCount++;
  }

  report(job: BackupJob, status: JobStatus): void {
    for (const listener of this.listeners) listener(job, status);
  }
}
