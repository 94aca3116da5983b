// Who hears of a job: pings, the metrics file. What goes wrong with them is a line, and changes no result.
import { randomUUID } from "node:crypto";
import { toCowcatcherError } from "../../errors.js";
import type { Job } from "../job.js";
import type { JobResult } from "../result.js";
import { ping } from "./ping.js";
import { writeMetrics } from "./prometheus.js";

export class Notices {
  readonly #runIds = new Map<string, string>();

  constructor(private readonly warn: (job: string, problem: string) => void) {}

  async started({ name, pings }: Job): Promise<void> {
    this.#runIds.set(name, randomUUID());
    await this.#ping(name, pings?.start, { job: name });
  }

  async finished({ name, pings, metricsFolder }: Job, result: JobResult): Promise<void> {
    // A job that was skipped has neither succeeded nor failed; whoever waits for its ping is to hear so.
    if (result.result !== "skipped") {
      await this.#ping(name, result.exit_code === 0 ? pings?.success : pings?.fail, result);
    }
    if (metricsFolder === undefined) return;
    await writeMetrics(metricsFolder, result).catch((error: unknown) => {
      this.warn(name, toCowcatcherError(error, metricsFolder).message);
    });
  }

  async #ping(job: string, address: string | undefined, document: unknown): Promise<void> {
    if (address === undefined) return;
    const problem = await ping(address, this.#runIds.get(job) ?? "", document);
    if (problem !== undefined) this.warn(job, problem);
  }
}
