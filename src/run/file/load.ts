// The folder of job files: /etc/cowcatcher/jobs.d for root, ~/.config/cowcatcher/jobs.d for others. Each *.yaml and *.yml in
// it is a job file; defaults.yaml has a `defaults` section alone, for all of them.
//
// A job file names programs that are run and files that are removed. So none is taken that somebody else could
// write: it, and its folder, belong to this user or to root, and others may not write them.
import { open, readdir, stat } from "node:fs/promises";
import { homedir } from "node:os";
import { basename, join } from "node:path";
import { CowcatcherError, ioError, toCowcatcherError } from "../../errors.js";
import type { Job } from "../job.js";
import { asFault, resolveJob } from "./resolve.js";
import type { JobValues } from "./job-shape.js";
import { type FileFault, MAX_JOB_FILE_BYTES, type ReadFile, type ReadJob, readJobFile } from "./parse.js";

const EXTENSION = /\.ya?ml$/;
const DEFAULTS_FILE = /^defaults\.ya?ml$/;
const MAX_FILES = 10_000;
const OTHERS_MAY_WRITE = 0o002;

export interface LoadedJobs {
  /** Job files that were read. */
  files: string[];
  /** By name, in order; those that are whole. */
  jobs: Job[];
  /** Names of the jobs that are there, of which some may be wrong. */
  names: Set<string>;
  faults: FileFault[];
}

export function defaultJobFolder(environment: Record<string, string | undefined> = process.env): string {
  if (process.getuid?.() === 0) return "/etc/cowcatcher/jobs.d";
  return join(environment["XDG_CONFIG_HOME"] || join(homedir(), ".config"), "cowcatcher", "jobs.d");
}

/**
 * @param path folder, or a job file
 * @param checkArguments throws what `backup` has to say of arguments
 * @throws CowcatcherError where the folder, or the file that was named, cannot be read
 */
export async function loadJobs(path: string, checkArguments: (job: Job) => void): Promise<LoadedJobs> {
  const isFolder = await stat(path).then(
    (stats) => stats.isDirectory(),
    (error: unknown) => {
      throw ioError("read the job files", path, error);
    },
  );
  const names = isFolder ? await namesIn(path) : [basename(path)];
  const files = isFolder ? names.map((name) => join(path, name)) : [path];
  const read: ReadFile[] = [];
  for (const file of files) read.push(await readOne(file));
  const shared = read.find(({ file }) => DEFAULTS_FILE.test(basename(file)));
  const faults = read.flatMap((one) => one.faults);
  const jobs = new Map<string, Job>();
  const found = new Map<string, string>();
  for (const { file, defaults, areDefaultsWhole, jobs: own } of read) {
    const isSure = areDefaultsWhole && shared?.areDefaultsWhole !== false;
    for (const job of own) {
      const other = found.get(job.name);
      if (other !== undefined) {
        faults.push({
          ...job.place,
          path: `jobs.${job.name}`,
          problem: `is in ${other}, too`,
          hint: "give it another name",
        });
        continue;
      }
      found.set(job.name, file);
      if (!job.isWhole || !isSure) continue;
      const resolved = resolveJob(job, [defaults, shared?.defaults ?? {}] satisfies JobValues[]);
      const fault = "problem" in resolved ? resolved : faultOf(job, resolved, checkArguments);
      if (fault !== undefined) faults.push(fault);
      else if (!("problem" in resolved)) jobs.set(job.name, resolved);
    }
  }
  const sorted = [...jobs.values()].sort((a, b) => (a.name < b.name ? -1 : 1));
  return { files, jobs: sorted, names: new Set(found.keys()), faults: faults.sort(byPlace) };
}

function faultOf(read: ReadJob, job: Job, checkArguments: (job: Job) => void): FileFault | undefined {
  try {
    checkArguments(job);
    return undefined;
  } catch (error) {
    return asFault(read, error);
  }
}

function byPlace(a: FileFault, b: FileFault): number {
  if (a.file !== b.file) return a.file < b.file ? -1 : 1;
  return a.line - b.line || a.column - b.column;
}

async function namesIn(folder: string): Promise<string[]> {
  await refuseForeign(folder);
  const names = await readdir(folder).catch((error: unknown) => {
    throw ioError("read the job files", folder, error);
  });
  // Hidden ones are an editor's.
  const own = names.filter((name) => EXTENSION.test(name) && !name.startsWith(".")).sort();
  if (own.length <= MAX_FILES) return own;
  throw new CowcatcherError({
    code: "LIMIT",
    object: folder,
    problem: `has more than ${MAX_FILES} job files`,
  });
}

async function refuseForeign(path: string): Promise<void> {
  const { uid, mode } = await stat(path);
  const isOwn = uid === 0 || uid === process.getuid?.();
  if (isOwn && (mode & OTHERS_MAY_WRITE) === 0) return;
  throw new CowcatcherError({
    code: "USAGE",
    object: path,
    problem: isOwn ? "can be written by everybody" : `belongs to another user (uid ${uid})`,
    hint: "a job file names programs that are run: chown and chmod it",
  });
}

async function readOne(file: string): Promise<ReadFile> {
  try {
    await refuseForeign(file);
    const handle = await open(file, "r");
    try {
      const { size } = await handle.stat();
      if (size > MAX_JOB_FILE_BYTES) {
        throw new CowcatcherError({
          code: "LIMIT",
          object: file,
          problem: `is larger than ${MAX_JOB_FILE_BYTES} bytes`,
        });
      }
      return readJobFile(file, await handle.readFile("utf8"));
    } finally {
      await handle.close();
    }
  } catch (error) {
    const { problem, hint } = toCowcatcherError(ioError("read", file, error), file);
    return {
      file,
      defaults: {},
      areDefaultsWhole: false,
      jobs: [],
      faults: [{ file, line: 1, column: 1, path: "", problem, hint }],
    };
  }
}
