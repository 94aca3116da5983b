// The keys of a job, with what each means: the one place that the parser, the JSON schema and the manual page have them from.
import { isScalar } from "yaml";
import { CowcatcherError } from "../../errors.js";
import { RULES, type Retention } from "../../repository/upkeep/retention.js";
import { parsePattern } from "../pattern.js";
import { parseWindow } from "../window.js";
import {
  choice,
  count,
  duration,
  either,
  flag,
  list,
  type Members,
  named,
  parsed,
  record,
  type Shape,
  text,
  type ValuesOf,
  whole,
} from "./shape.js";

export const NAME = "^[A-Za-z0-9][A-Za-z0-9._+-]{0,99}$";
export const LEVELS = ["auto", "full", "incremental"] as const;
export type Level = (typeof LEVELS)[number];

const MAX_RETRIES = 100;
const MAX_KEEP = 1_000_000;
/** One value of an option of `backup`. */
const optionValue: Shape<string | boolean> = {
  schema: { type: ["string", "number", "boolean"] },
  read(node, path, reader) {
    if (isScalar(node) && typeof node.value === "boolean") return node.value;
    return text("a value").read(node, path, reader);
  },
};

const keep = whole(
  record(
    "how many backups to keep, by the rules of `repo forget`; of plain files whole chains are kept and removed",
    Object.fromEntries(
      RULES.map((rule) => [
        rule,
        count(rule === "last" ? "the last so many" : `one each of so many, ${rule}`, 0, MAX_KEEP),
      ]),
    ),
  ),
);

const ping = either(
  isScalar,
  parsed(
    "an address that is asked at the end with the result as JSON; with /start and /fail behind it at the start and after a failure",
    {},
    parseUrl,
  ),
  whole(
    record("addresses for each event", {
      start: parsed("asked before the backup", {}, parseUrl),
      success: parsed("asked after a good one", {}, parseUrl),
      fail: parsed("asked after a failure", {}, parseUrl),
    }),
  ),
);

/** Of a job, and of `defaults`, where what names a source makes no sense. */
export const JOB_MEMBERS = {
  image: text("path of an image that nobody writes, or an address of one"),
  images: named("disks of a machine that is off: their names and images", text("an image"), {
    pattern: NAME,
  }),
  control: text("control socket of the `serve` that has the disks open"),
  qmp: text("QMP socket of the QEMU that runs the guest"),
  libvirt: text("domain of libvirt that runs the guest"),
  connect: text("libvirt's URI of the hypervisor, where it is not virsh's own default"),
  disks: list(text("name of a disk, as --disk of `backup` has it")),
  freeze: text(
    "socket of the guest agent, which holds the guest's file systems still for T0; of a domain also 'libvirt': by its channel",
  ),
  group: parsed("group of the backups: the job's name unless given", { pattern: NAME }, parseName),
  target: parsed(
    "where the backup goes: a path with {group}, {disk} and {date} in it, or the address of an export or an RBD image",
    {},
    parsePattern,
  ),
  repository: text("repository that the backup goes into: a folder or s3:https://HOST/BUCKET"),
  "key-file": parsed("key of an encrypted repository", { pattern: "^/" }, parseAbsolute),
  "passphrase-file": parsed(
    "file with the passphrase of an encrypted repository",
    { pattern: "^/" },
    parseAbsolute,
  ),
  level: choice("auto: incremental where it can be, else full", LEVELS),
  "full-every": duration("a full backup is made when the chain's first is older, such as 7d (the default)"),
  keep,
  prune: flag("after a backup is forgotten in a repository, free what no other refers to (true)"),
  verify: either(
    (node) => isScalar(node) && typeof node.value === "boolean",
    flag("read the backup back and compare it"),
    parsed(
      "of a repository the share of chunks to read, such as 5%",
      { pattern: "^\\d+(\\.\\d+)?%$" },
      parsePercent,
    ),
  ),
  options: named("options of `backup` by their long names, such as `rate-limit: 50M`", optionValue, {
    pattern: "^[a-z][a-z0-9-]*$",
  }),
  window: parsed(
    "local time in which the job may start, such as 22:00-06:00",
    { pattern: "^\\d\\d:\\d\\d-\\d\\d:\\d\\d$" },
    parseWindow,
  ),
  "require-mount": parsed(
    "folder that must be a mount point, such as the one of the backup disk",
    { pattern: "^/" },
    parseAbsolute,
  ),
  "check-space": flag(
    "refuse to begin where the target has less room than the backup is expected to take (true)",
  ),
  retries: count("how often to try again after a failure (0)", 0, MAX_RETRIES),
  "retry-wait": duration("pause before trying again (60)"),
  "time-limit": duration("the longest that one try may take; then it is ended, and has failed (none)", {
    isPositive: true,
  }),
  "lock-wait": duration(
    "how long to wait for another run that has the disk or the repository, or another backup of the source (0)",
  ),
  hook: list(text("program to run at each phase, and its arguments")),
  "hook-timeout": duration("the longest that a hook may take (300)", { isPositive: true }),
  ping,
  metrics: parsed("folder of node_exporter's text files", { pattern: "^/" }, parseAbsolute),
  mail: list(parsed("address to write to, by sendmail", { pattern: "^\\S+$" }, parseMailAddress)),
  "mail-on": choice("failure: of jobs that failed alone (the default)", ["failure", "always"] as const),
  enabled: flag("false: passed over with --all"),
} satisfies Members;

export type JobMembers = typeof JOB_MEMBERS;
export type JobValues = ValuesOf<JobMembers>;

/** Words of vzdump.conf and of the command line: what to give instead. */
export const OTHER_WORDS: ReadonlyMap<string, string> = new Map([
  ["prune-backups", "give 'keep', such as keep: {daily: 7, weekly: 4}"],
  ["bwlimit", "give options: {rate-limit: 50M}"],
  ["mailto", "give 'mail'"],
  ["script", "give 'hook'"],
  ["lockwait", "give 'lock-wait'"],
  ["storage", "give 'target' or 'repository'"],
  ["repo", "give 'repository'"],
  ["schedule", "a job has no time of its own: give cowcatcher-run.timer one, and 'window' bounds it"],
  ...["rate-limit", "compress", "direct", "workers", "cow-buffer-size", "on-buffer-full", "spill-dir"].map(
    (option) => [option, `it is an option of \`backup\`: give options: {${option}: …}`] as const,
  ),
]);

/** Of the machine: one job's alone. */
export const SOURCE_KEYS = ["image", "images", "control", "qmp", "libvirt"] as const;
export const NOT_FOR_DEFAULTS: readonly string[] = [...SOURCE_KEYS, "disks", "freeze", "group"];

function wrong(problem: string, hint: string): CowcatcherError {
  return new CowcatcherError({ code: "USAGE", object: "", problem, hint });
}

function parseName(name: string): string {
  if (new RegExp(NAME).test(name)) return name;
  throw wrong(
    `'${name}' is no name`,
    "give letters, digits, '.', '_', '+' and '-', a letter or digit first, 100 at most",
  );
}

function parseUrl(address: string): string {
  const url = URL.canParse(address) ? new URL(address) : undefined;
  if (url?.protocol === "http:" || url?.protocol === "https:") return address;
  throw wrong("is no address of a web server", "give http://… or https://…");
}

function parseMailAddress(address: string): string {
  if (/^\S+$/.test(address)) return address;
  throw wrong(`'${address}' is no address`, "give one, or a list: [root, admin@example.org]");
}

function parsePercent(share: string): string {
  const percent = Number(/^(\d+(?:\.\d+)?)%$/.exec(share)?.[1] ?? NaN);
  if (percent > 0 && percent <= 100) return share;
  throw wrong(`'${share}' is no share`, "give true, false, or more than 0% and up to 100%");
}

function parseAbsolute(path: string): string {
  if (path.startsWith("/")) return path;
  throw wrong(`'${path}' is not absolute`, "begin it with /");
}

export function retentionOf(values: JobValues): Retention | undefined {
  return values.keep;
}
