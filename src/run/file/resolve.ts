// From what job files say to jobs: defaults inherited, and what does not go together refused, each with its place.
import { CowcatcherError } from "../../errors.js";
import { diskNameOf } from "../disk-name.js";
import { isOfQemu, type Job, JOB_FILE_DEFAULTS, type JobSource, type JobTarget, type Place } from "../job.js";
import { type JobMembers, type JobValues, retentionOf, SOURCE_KEYS } from "./job-shape.js";
import type { FileFault, ReadJob } from "./parse.js";
import { listed } from "./shape.js";

/** Options of `backup` that the job's own keys stand for, or that would change what a run reads of it. */
const OWN_OPTIONS: Record<string, string> = {
  control: "give `control`",
  qmp: "give `qmp`",
  libvirt: "give `libvirt`",
  connect: "give `connect`",
  disk: "give `disks`",
  freeze: "give `freeze`",
  repo: "give `repository`",
  group: "give `group`",
  level: "give `level`",
  verify: "give `verify`",
  "key-file": "give `key-file`",
  "passphrase-file": "give `passphrase-file`",
  checkpoint: "give `level`",
  since: "give `level`",
  "since-or-full": "give `level`",
  "backing-file": "give `level`",
  "backing-format": "give `level`",
  "dry-run": "give --dry-run to `run`",
  json: "give --json to `run`",
  quiet: "give --quiet to `run`",
  progress: "leave it out",
  "no-progress": "leave it out",
  bitmap: "give `level`",
  "bitmap-replaces": "give `level`",
  "bitmap-keeps-base": "give `verify`",
  "t0-gate": "give `hook`",
  cleanup: "give --cleanup to `backup`",
  help: "leave it out",
};

/** Instead of a socket of the guest agent: libvirt's own channel to it. */
const LIBVIRT_CHANNEL = "libvirt";
/** Sources of guests that run. */
const GUESTS = "'control', 'qmp' and 'libvirt'";

class Refusal extends Error {
  constructor(
    readonly key: keyof JobMembers | undefined,
    readonly problem: string,
    readonly hint: string | undefined,
    /** A key below that one. */
    readonly below?: string,
  ) {
    super(problem);
  }
}

/** The job, or what is wrong with it. @param defaults the file's and defaults.yaml's, the nearer first */
export function resolveJob(read: ReadJob, defaults: readonly JobValues[]): Job | FileFault {
  const values = inherit(read.values, defaults);
  try {
    // In `defaults` it is for those jobs that have a domain.
    if (read.values.connect !== undefined && read.values.libvirt === undefined)
      throw new Refusal("connect", "goes with 'libvirt' alone", "leave it out");
    return makeJob(read.name, read.place, values);
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    const { key, problem, hint, below } = error;
    const found = key === undefined ? undefined : (read.placeOf(key, below) ?? read.placeOf(key));
    const path = `jobs.${read.name}${key === undefined ? "" : `.${key}`}`;
    return { ...(found ?? read.place), path, problem, hint };
  }
}

function inherit(own: JobValues, defaults: readonly JobValues[]): JobValues {
  const all = [own, ...defaults];
  const values = Object.assign({}, ...[...all].reverse()) as JobValues;
  // A target and a repository are two answers to one question, so that the nearer one goes.
  const nearest = all.find(({ target, repository }) => target !== undefined || repository !== undefined);
  values.target = nearest?.target;
  values.repository = nearest?.repository;
  const options = [...all].reverse().flatMap((one) => [...(one.options ?? [])]);
  if (options.length > 0) values.options = new Map(options);
  return values;
}

function makeJob(name: string, place: Place, values: JobValues): Job {
  const target = targetOf(values);
  const source = sourceOf(values);
  const { mail, hook, ping } = values;
  checkTogether(source, target, values);
  const { freeze } = values;
  return {
    name,
    place,
    group: values.group ?? name,
    source,
    target,
    level: values.level ?? JOB_FILE_DEFAULTS.level,
    fullEveryMs: values["full-every"] ?? JOB_FILE_DEFAULTS.fullEveryMs,
    retention: retentionOf(values),
    verify: values.verify === false ? undefined : values.verify,
    options: [...optionArguments(values), ...(freeze === undefined ? [] : [`--freeze=${freeze}`])],
    keyArguments: keyArguments(values, target),
    window: values.window,
    requireMount: values["require-mount"],
    checkSpace: values["check-space"] ?? true,
    retries: values.retries ?? JOB_FILE_DEFAULTS.retries,
    retryWaitMs: values["retry-wait"] ?? JOB_FILE_DEFAULTS.retryWaitMs,
    timeLimitMs: values["time-limit"],
    lockWaitMs: values["lock-wait"] ?? JOB_FILE_DEFAULTS.lockWaitMs,
    hook,
    hookTimeoutMs: values["hook-timeout"] ?? JOB_FILE_DEFAULTS.hookTimeoutMs,
    pings: pingsOf(ping),
    metricsFolder: values.metrics,
    mail: mail === undefined ? undefined : { addresses: mail, always: values["mail-on"] === "always" },
    isEnabled: values.enabled ?? true,
  };
}

function sourceOf(values: JobValues): JobSource {
  const given = SOURCE_KEYS.filter((key) => values[key] !== undefined);
  const [first, second] = given;
  if (first === undefined) throw new Refusal(undefined, "names no source", `give ${listed(SOURCE_KEYS)}`);
  if (second !== undefined) throw new Refusal(second, `does not go with '${first}'`, "give one of them");
  const { image, images, control, qmp, libvirt, connect, disks } = values;
  const repeated = disks?.find((disk, index) => disks.indexOf(disk) !== index);
  if (repeated !== undefined) throw new Refusal("disks", `'${repeated}' is given twice`, undefined);
  if (control !== undefined) return { kind: "control", socket: absolute("control", control), disks };
  if (qmp !== undefined) return { kind: "qmp", socket: absolute("qmp", qmp), disks };
  if (libvirt !== undefined) return { kind: "libvirt", domain: libvirt, connect, disks };
  if (disks !== undefined)
    throw new Refusal("disks", `goes with ${GUESTS} alone`, "give 'images' to name disks");
  if (images !== undefined) {
    if (images.size === 0) throw new Refusal("images", "has no disk", undefined);
    return {
      kind: "images",
      disks: [...images].map(([disk, path]) => ({ name: disk, image: anImage("images", path, disk) })),
    };
  }
  return { kind: "images", disks: [{ name: diskNameOf(image ?? ""), image: anImage("image", image ?? "") }] };
}

/** An address begins with a scheme, or names a backup in a repository. */
const ADDRESS = /^[a-z][a-z0-9+]*:|::/;

/** The timer's run is in no folder of anybody's. */
function anImage(key: "image" | "images", text: string, disk?: string): string {
  if (text.startsWith("/") || ADDRESS.test(text)) return text;
  throw new Refusal(key, `'${text}' is not absolute`, "begin it with /", disk);
}

function absolute(key: keyof JobMembers, path: string): string {
  if (path.startsWith("/")) return path;
  throw new Refusal(key, `'${path}' is not absolute`, "begin it with /");
}

function targetOf({ target, repository, prune }: JobValues): JobTarget {
  if (repository !== undefined) {
    const isAddress = repository.startsWith("s3:");
    return {
      kind: "repository",
      repository: isAddress ? repository : absolute("repository", repository),
      prune: prune ?? true,
    };
  }
  if (target !== undefined) return { kind: "pattern", pattern: target };
  throw new Refusal(undefined, "says nothing of where the backup goes", "give 'target' or 'repository'");
}

function checkTogether(source: JobSource, target: JobTarget, values: JobValues): void {
  const { keep, verify, level, freeze, hook } = values;
  const [program = ""] = hook ?? [];
  if (program.includes("/") && !program.startsWith("/"))
    throw new Refusal("hook", `'${program}' is not absolute`, "begin it with /");
  if (freeze !== undefined && freeze !== LIBVIRT_CHANNEL) absolute("freeze", freeze);
  if (keep !== undefined && Object.values(keep).every((count) => count === 0))
    throw new Refusal(
      "keep",
      "keeps nothing",
      "give at least one rule, such as keep: {last: 3}, or leave it out",
    );
  if (freeze !== undefined && source.kind === "images") {
    throw new Refusal("freeze", `goes with ${GUESTS} alone`, "leave it out");
  }
  if (target.kind === "repository") return;
  const { pattern } = target;
  const severalDisks = source.kind === "images" ? source.disks.length > 1 : (source.disks?.length ?? 1) > 1;
  if (severalDisks && !pattern.hasDisk) {
    throw new Refusal("target", "has no {disk}, and there are several disks", "put {disk} into it");
  }
  if (isOfQemu(source) && "disks" in source && source.disks === undefined && pattern.hasDisk) {
    throw new Refusal("target", "has {disk}, and no disk of the guest is named", "give 'disks'");
  }
  if (typeof verify === "string") {
    throw new Refusal(
      "verify",
      `${verify} of a file cannot be verified`,
      "give true; a share goes with a repository",
    );
  }
  if (keep !== undefined && !pattern.isFile) {
    throw new Refusal(
      "keep",
      "goes with files and repositories, and the target is written in place",
      "leave it out",
    );
  }
  if (level !== "incremental") return;
  if (source.kind === "images") {
    const hint = "give 'control', 'qmp' or 'libvirt', or a repository, or level: full";
    throw new Refusal("level", "an incremental file needs somebody who keeps track of the disk", hint);
  }
  if (!pattern.isFile) {
    throw new Refusal("level", "what is written in place has no chain of backups", "give level: full");
  }
}

function optionArguments({ options }: JobValues): string[] {
  return [...(options ?? [])].flatMap(([name, value]) => {
    const own = OWN_OPTIONS[name];
    if (own !== undefined) throw new Refusal("options", `'${name}' is not for here`, own, name);
    if (value === false) throw new Refusal("options", `'${name}: false' means nothing`, "leave it out", name);
    return [value === true ? `--${name}` : `--${name}=${value}`];
  });
}

function keyArguments(values: JobValues, target: JobTarget): string[] {
  const { "key-file": keyFile, "passphrase-file": passphraseFile } = values;
  if (target.kind !== "repository") return [];
  if (keyFile !== undefined && passphraseFile !== undefined) {
    throw new Refusal("passphrase-file", "does not go with 'key-file'", "give one of them");
  }
  return [
    ...(keyFile === undefined ? [] : [`--key-file=${keyFile}`]),
    ...(passphraseFile === undefined ? [] : [`--passphrase-file=${passphraseFile}`]),
  ];
}

function pingsOf(ping: JobValues["ping"]): Job["pings"] {
  if (ping === undefined) return undefined;
  if (typeof ping !== "string") {
    const { start, success, fail } = ping;
    return { start, success, fail };
  }
  return { start: withPath(ping, "start"), success: ping, fail: withPath(ping, "fail") };
}

/** A word behind an address's path, before what it asks. */
function withPath(address: string, word: string): string {
  const url = new URL(address);
  url.pathname = `${url.pathname.replace(/\/$/, "")}/${word}`;
  return url.href;
}

/** What `backup` itself has to say of a job's arguments, as a fault of the job file. */
export function asFault({ name, place, placeOf }: ReadJob, error: unknown): FileFault {
  if (!(error instanceof CowcatcherError)) throw error;
  const { object, problem, hint } = error;
  // An option's own place; an inherited one is where the job is.
  const option = object.startsWith("--") ? placeOf("options", object.slice(2)) : undefined;
  return {
    ...(option ?? place),
    path: `jobs.${name}`,
    problem: `backup refuses it: ${object}: ${problem}`,
    hint,
  };
}
