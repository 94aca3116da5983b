// Job files: from their text to jobs, with each fault's file, line and column.
//
//   defaults:            # what the jobs of this file inherit; in a file of this name (defaults.yaml) those of all files
//     target: /backup/{group}/{disk}-{date}.qcow2
//   jobs:
//     vm1:
//       control: /run/cowcatcher/vm1.ctl
//
// A job's own value goes before its file's default, and that before defaults.yaml's. Mappings (`keep`, `options`) are
// taken as a whole, but for `options`, of which each one is inherited by itself. YAML 1.2: 22:00 is a text, and `on` no boolean.
import { LineCounter, parseDocument, type Node, type YAMLError } from "yaml";
import type { Place } from "../job.js";
import {
  JOB_MEMBERS,
  type JobMembers,
  type JobValues,
  NAME,
  NOT_FOR_DEFAULTS,
  OTHER_WORDS,
} from "./job-shape.js";
import {
  type Fault,
  type JsonSchema,
  keyIn,
  named,
  type NodesOf,
  type Reader,
  record,
  type ReadRecord,
} from "./shape.js";

export const MAX_JOB_FILE_BYTES = 1024 * 1024;

export interface FileFault extends Place {
  /** Path of keys, such as `jobs.vm1.keep`; empty: the file. */
  path: string;
  problem: string;
  hint: string | undefined;
}

/** What a job's text says; nothing filled in. */
export interface ReadJob {
  name: string;
  place: Place;
  values: JobValues;
  /** Nothing in it was wrong by itself. */
  isWhole: boolean;
  /** The place of a key of its own, or of one of the keys below it; undefined: it has none of that name. */
  placeOf: (key: keyof JobMembers, below?: string) => Place | undefined;
}

export interface ReadFile {
  file: string;
  defaults: JobValues;
  /** Else no job that inherits them may be run: what is missing may be what keeps it from doing harm. */
  areDefaultsWhole: boolean;
  jobs: ReadJob[];
  faults: FileFault[];
}

const job = record("a backup that is made again and again", JOB_MEMBERS, OTHER_WORDS);
const inherited = record(
  "what jobs inherit",
  Object.fromEntries(
    Object.entries(JOB_MEMBERS).filter(([key]) => !NOT_FOR_DEFAULTS.includes(key)),
  ) as unknown as JobMembers,
  OTHER_WORDS,
);
const file = record("job file of cowcatcher run", {
  defaults: inherited,
  jobs: named("jobs by their names", job, { pattern: NAME, isPartial: true }),
});

/** For editors: docs/schema/job-file.json. */
export function jobFileSchema(): JsonSchema {
  return {
    $schema: "https://json-schema.org/draft/2020-12/schema",
    title: "Job file of cowcatcher run",
    ...file.schema,
  };
}

class DocumentReader implements Reader {
  readonly faults: Fault[] = [];

  constructor(readonly document: Reader["document"]) {}

  fail(node: Node, path: string, problem: string, hint?: string): undefined {
    this.faults.push({ at: node.range?.[0] ?? 0, path, problem, hint });
    return undefined;
  }
}

/** Never throws: what is wrong is in `faults`, in the order of the file. */
export function readJobFile(path: string, text: string): ReadFile {
  const lines = new LineCounter();
  const document = parseDocument(text, { lineCounter: lines, version: "1.2", uniqueKeys: false });
  const placeAt = (offset: number): Place => {
    const { line, col } = lines.linePos(offset);
    return { file: path, line: Math.max(line, 1), column: Math.max(col, 1) };
  };
  const result: ReadFile = { file: path, defaults: {}, areDefaultsWhole: false, jobs: [], faults: [] };
  const fromParser = withoutRepeats(
    [...document.errors, ...document.warnings].map((error) => parserFault(error, placeAt)),
  );
  if (fromParser.length > 0) return { ...result, faults: fromParser };
  if (document.contents === null) return { ...result, faults: [emptyFault(placeAt(0))] };
  const reader = new DocumentReader(document);
  const read = file.read(document.contents, "", reader);
  const { defaults, jobs } = read?.values ?? {};
  result.defaults = defaults?.values ?? {};
  result.areDefaultsWhole =
    read !== undefined && (defaults === undefined ? read.nodes.defaults === undefined : defaults.isWhole);
  for (const [name, own] of jobs ?? []) result.jobs.push(readJob(name, own, document.contents, placeAt));
  result.faults = reader.faults
    .sort((a, b) => a.at - b.at)
    .map(({ at, path: keys, problem, hint }) => ({ ...placeAt(at), path: keys, problem, hint }));
  return result;
}

function readJob(
  name: string,
  { values, nodes, isWhole }: ReadRecord<JobMembers>,
  root: Node,
  placeAt: (offset: number) => Place,
): ReadJob {
  const keys: NodesOf<JobMembers> = nodes;
  const offsets = Object.values(keys).map((node) => node?.key.range?.[0] ?? 0);
  const place = placeAt(offsets.length === 0 ? (root.range?.[0] ?? 0) : Math.min(...offsets));
  return {
    name,
    place,
    values,
    isWhole,
    placeOf: (key, below) => {
      const member = keys[key];
      const node = below === undefined || member === undefined ? member?.key : keyIn(member.value, below);
      const offset = node?.range?.[0];
      return offset === undefined ? undefined : placeAt(offset);
    },
  };
}

function parserFault(error: YAMLError, placeAt: (offset: number) => Place): FileFault {
  // Its message goes on with the place, and a picture of the line.
  const problem = error.message.replace(/ at line \d+, column \d+:?[^]*$/, "");
  const hint = error.code === "TAB_AS_INDENT" ? "indent with spaces" : undefined;
  return { ...placeAt(error.pos[0]), path: "", problem, hint };
}

/** The parser says of some mistakes twice that they are there. */
function withoutRepeats(faults: readonly FileFault[]): FileFault[] {
  return [...new Map(faults.map((fault) => [faultLine(fault), fault])).values()];
}

function emptyFault(place: Place): FileFault {
  return { ...place, path: "", problem: "has no job", hint: "see docs/jobs.md" };
}

export function faultLine({ file: name, line, column, path, problem, hint }: FileFault): string {
  const where = path === "" ? "" : `${path}: `;
  return `${name}:${line}:${column}: ${where}${problem}${hint === undefined ? "" : ` (${hint})`}`;
}
