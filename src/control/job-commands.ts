// The commands that show and steer jobs. job-* name a job by `id` and answer GenericError where there is none;
// the older block-job-* name it by `device` and answer DeviceNotActive (qapi/job.json, qapi/block-core.json).

import type { BackupJob, JobStatus } from "../backup/host.js";
import { command } from "./command.js";
import type { Command, CommandContext } from "./command.js";
import { ioStatus } from "./job-monitor.js";
import { QmpError, genericError } from "../qmp/protocol.js";
import type { JsonObject } from "../qmp/protocol.js";
import { boolean, integer, optional, string } from "../qmp/schema.js";
import { jobToWire } from "./job-wire.js";

type Verb = "cancel" | "pause" | "resume" | "set-speed" | "complete" | "finalize" | "dismiss";

const ALIVE: readonly JobStatus[] = ["created", "running", "paused"];

/** The states in which QEMU's job.c lets a verb through. `complete` needs `ready`, which a backup never is. */
const STATES_OF_VERB: Record<Verb, readonly JobStatus[]> = {
  cancel: [...ALIVE, "waiting", "pending"],
  pause: ALIVE,
  resume: ALIVE,
  "set-speed": ALIVE,
  complete: [],
  finalize: ["pending"],
  dismiss: ["concluded"],
};

type Action = (job: BackupJob, context: CommandContext) => void;

const ACTIONS: Record<Exclude<Verb, "set-speed">, Action> = {
  cancel: (job) => job.cancel(),
  pause: (job, { monitor }) => monitor.pause(job),
  resume: (job, { monitor }) => monitor.resume(job),
  complete: () => undefined,
  finalize: (job) => job.finalize?.(),
  dismiss: (job, { monitor }) => monitor.dismiss(job.id),
};

function checkVerb(job: BackupJob, verb: Verb): void {
  if (STATES_OF_VERB[verb].includes(job.status)) return;
  throw genericError(`Job '${job.id}' in state '${job.status}' cannot accept command verb '${verb}'`);
}

function apply(verb: Exclude<Verb, "set-speed">, job: BackupJob, context: CommandContext): JsonObject {
  // QEMU says of a job that is not paused that it is not, whatever its state.
  if (verb !== "resume" || context.monitor.isPaused(job)) checkVerb(job, verb);
  ACTIONS[verb](job, context);
  return {};
}

function findJob(id: string, { host }: CommandContext): BackupJob {
  const job = host.jobs().find((candidate) => candidate.id === id);
  if (job === undefined) throw genericError("Job not found");
  return job;
}

function findBlockJob(device: string, { host }: CommandContext): BackupJob {
  const job = host.jobs().find((candidate) => candidate.id === device);
  if (job === undefined) throw new QmpError("DeviceNotActive", `Block job '${device}' not found`);
  return job;
}

function byId(verb: Exclude<Verb, "set-speed">): Command {
  return command({ id: string }, ({ id }, context) => apply(verb, findJob(id, context), context));
}

function byDevice(verb: Exclude<Verb, "set-speed">): Command {
  return command({ device: string }, ({ device }, context) =>
    apply(verb, findBlockJob(device, context), context),
  );
}

function byBlockJobId(verb: Exclude<Verb, "set-speed">): Command {
  return command({ id: string }, ({ id }, context) => apply(verb, findBlockJob(id, context), context));
}

function jobInfo(job: BackupJob): JsonObject {
  const { bytesDone, bytesTotal } = job.progress();
  return {
    id: job.id,
    type: "backup",
    status: job.status,
    "current-progress": bytesDone,
    "total-progress": bytesTotal,
    error: job.error?.message,
    "x-cowcatcher": jobToWire(job),
  };
}

function blockJobInfo(job: BackupJob, { monitor }: CommandContext): JsonObject {
  const { bytesDone, bytesTotal } = job.progress();
  return {
    type: "backup",
    device: job.id,
    len: bytesTotal,
    offset: bytesDone,
    busy: job.status === "running",
    paused: monitor.isPaused(job),
    speed: job.speed,
    "io-status": ioStatus(job),
    ready: false,
    status: job.status,
    "auto-finalize": job.options.autoFinalize !== false,
    "auto-dismiss": monitor.autoDismisses(job.id),
    error: job.error?.message,
  };
}

export const JOB_COMMANDS: Record<string, Command> = {
  "query-jobs": command({}, (_args, { host }) => host.jobs().map(jobInfo)),
  "query-block-jobs": command({}, (_args, context) =>
    context.host.jobs().map((job) => blockJobInfo(job, context)),
  ),
  "job-pause": byId("pause"),
  "job-resume": byId("resume"),
  "job-cancel": byId("cancel"),
  "job-complete": byId("complete"),
  "job-finalize": byId("finalize"),
  "job-dismiss": byId("dismiss"),
  "block-job-pause": byDevice("pause"),
  "block-job-resume": byDevice("resume"),
  "block-job-complete": byDevice("complete"),
  // These two name it by `id`, and miss it as the older ones do.
  "block-job-finalize": byBlockJobId("finalize"),
  "block-job-dismiss": byBlockJobId("dismiss"),
  // `force` tells a mirror job from a ready one; a backup is cancelled the same way with either.
  "block-job-cancel": command({ device: string, force: optional(boolean) }, ({ device }, context) =>
    apply("cancel", findBlockJob(device, context), context),
  ),
  "block-job-set-speed": command({ device: string, speed: integer }, ({ device, speed }, context) => {
    const job = findBlockJob(device, context);
    checkVerb(job, "set-speed");
    if (speed < 0) throw genericError("Parameter 'speed' expects a non-negative value");
    job.setSpeed(speed);
    return {};
  }),
};
