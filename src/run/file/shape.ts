// Shapes of values in a job file. A shape reads a node of the YAML document, and says the same as a JSON schema for
// editors, so that the two cannot drift apart (docs/schema/job-file.json, held by test/unit/run/job-file.test.ts).
//
// All that is wrong in a file is told, not the first thing alone: a reader notes a fault and goes on, and what could not be
// read is undefined. An alias (*name) stands for what its anchor names; shapes are of bounded depth, so that a file of
// aliases to aliases is no bomb.
import { isAlias, isMap, isScalar, isSeq, type Document, type Node, type Pair } from "yaml";
import { CowcatcherError } from "../../errors.js";
import { parseSize } from "../../units.js";

export type JsonSchema = Record<string, unknown>;

/** Where and why; the file is the reader's. */
export interface Fault {
  /** Offset in characters of the text. */
  at: number;
  /** The path of keys, such as `jobs.vm1.keep`. */
  path: string;
  problem: string;
  hint: string | undefined;
}

export interface Reader {
  readonly document: Document;
  fail(node: Node, path: string, problem: string, hint?: string): undefined;
}

export interface Shape<T> {
  readonly schema: JsonSchema;
  /** Undefined where it is wrong, which the reader has been told. */
  read(node: Node, path: string, reader: Reader): T | undefined;
}

/** What stands at the end of an alias. Undefined where the anchor is missing, which the parser reports. */
export function resolved(node: Node, { document }: Reader): Node | undefined {
  return isAlias(node) ? node.resolve(document) : node;
}

function scalarText(node: Node): string | undefined {
  if (!isScalar(node)) return undefined;
  const { value } = node;
  // As it was written: 08 is no number that should become 8.
  if (typeof value === "number") return node.source ?? String(value);
  return typeof value === "string" ? value : undefined;
}

export function text(description: string, more: JsonSchema = {}): Shape<string> {
  return parsed(description, more, (found) => found);
}

/** A text that `parse` takes; what it throws is the fault. */
export function parsed<T>(description: string, more: JsonSchema, parse: (text: string) => T): Shape<T> {
  return {
    schema: { type: "string", description, ...more },
    read(node, path, reader) {
      const found = scalarText(node);
      if (found === undefined || found === "") {
        return reader.fail(node, path, found === "" ? "is empty" : "is no text", `give ${description}`);
      }
      return tried(() => parse(found), node, path, reader);
    },
  };
}

function tried<T>(read: () => T, node: Node, path: string, reader: Reader): T | undefined {
  try {
    return read();
  } catch (error) {
    if (!(error instanceof CowcatcherError)) throw error;
    return reader.fail(node, path, error.problem, error.hint);
  }
}

export function choice<T extends string>(description: string, words: readonly T[]): Shape<T> {
  return {
    schema: { enum: [...words], description },
    read(node, path, reader) {
      const found = scalarText(node);
      const word = words.find((known) => known === found);
      if (word !== undefined) return word;
      return reader.fail(
        node,
        path,
        `${shown(node)} is not known`,
        meant(found ?? "", words) ?? `give ${listed(words)}`,
      );
    },
  };
}

export function flag(description: string): Shape<boolean> {
  return {
    schema: { type: "boolean", description },
    read(node, path, reader) {
      if (isScalar(node) && typeof node.value === "boolean") return node.value;
      return reader.fail(node, path, `${shown(node)} is neither true nor false`);
    },
  };
}

export function count(description: string, min: number, max: number): Shape<number> {
  return {
    schema: { type: "integer", minimum: min, maximum: max, description },
    read(node, path, reader) {
      const value = isScalar(node) ? node.value : undefined;
      if (typeof value === "number" && Number.isInteger(value) && value >= min && value <= max) return value;
      return reader.fail(node, path, `${shown(node)} is not a number from ${min} to ${max}`);
    },
  };
}

const DURATION = /^(\d+(?:\.\d+)?)(ms|s|m|h|d|w)?$/;
const NO_DURATION = "^0+(\\.0+)?[a-z]*$";
const UNIT_MS: Record<string, number> = {
  ms: 1,
  s: 1000,
  m: 60_000,
  h: 3_600_000,
  d: 86_400_000,
  w: 604_800_000,
};

/** In milliseconds: 500ms, 30s, 5m, 8h, 7d, 2w, or plain seconds. @param bound isPositive: none is no duration */
export function duration(description: string, { isPositive = false } = {}): Shape<number> {
  const none = isPositive ? { exclusiveMinimum: 0, not: { pattern: NO_DURATION } } : {};
  return {
    schema: { type: ["string", "number"], pattern: DURATION.source, description, ...none },
    read(node, path, reader) {
      const [, digits, unit = "s"] = DURATION.exec(scalarText(node) ?? "") ?? [];
      if (isPositive && Number(digits) === 0)
        return reader.fail(node, path, "is no time at all", "give more than 0");
      if (digits !== undefined) return Number(digits) * (UNIT_MS[unit] ?? NaN);
      return reader.fail(
        node,
        path,
        `${shown(node)} is not a duration`,
        "give seconds, or a number with ms, s, m, h, d or w, such as 7d",
      );
    },
  };
}

/** In bytes. */
export function size(description: string): Shape<number> {
  return {
    schema: { type: ["string", "number"], description },
    read(node, path, reader) {
      return tried(() => parseSize(scalarText(node) ?? "", path), node, path, reader);
    },
  };
}

/** One or several: a single value stands for a list of it. */
export function list<T>(of: Shape<T>): Shape<T[]> {
  return {
    schema: { anyOf: [of.schema, { type: "array", items: of.schema, minItems: 1 }] },
    read(node, path, reader) {
      const items = isSeq(node) ? (node.items as Node[]) : [node];
      if (items.length === 0) return reader.fail(node, path, "is an empty list");
      const values = items.map((item, index) => {
        const at = isSeq(node) ? `${path}[${index}]` : path;
        const target = resolved(item, reader);
        return target === undefined ? undefined : of.read(target, at, reader);
      });
      return values.every((value) => value !== undefined) ? values : undefined;
    },
  };
}

/** A mapping of any names that fit. @param names isPartial: what is right in it counts, whatever is wrong besides */
export function named<T>(
  description: string,
  of: Shape<T>,
  names: { pattern?: string; known?: readonly string[]; isPartial?: boolean },
): Shape<Map<string, T>> {
  const { pattern, known, isPartial = false } = names;
  return {
    schema: {
      type: "object",
      description,
      ...(pattern === undefined ? {} : { propertyNames: { pattern } }),
      ...(known === undefined ? {} : { propertyNames: { enum: [...known] } }),
      additionalProperties: of.schema,
    },
    read(node, path, reader) {
      const values = new Map<string, T>();
      const found = members(node, path, reader);
      let isWhole = found?.isWhole ?? false;
      for (const { key, keyNode, value } of found?.members ?? []) {
        const isName = pattern === undefined || new RegExp(pattern).test(key);
        const isKnown = known?.includes(key) ?? true;
        if (!isName) reader.fail(keyNode, path, `'${key}' is no name`, `it must fit ${pattern}`);
        else if (!isKnown) reader.fail(keyNode, path, `'${key}' is not known`, meant(key, known ?? []));
        const read = isName && isKnown ? of.read(value, `${path}.${key}`, reader) : undefined;
        if (read === undefined) isWhole = false;
        else values.set(key, read);
      }
      return (isWhole || isPartial) && isMap(node) ? values : undefined;
    },
  };
}

export type Members = Record<string, Shape<unknown>>;
export type ValuesOf<M extends Members> = { [K in keyof M]?: M[K] extends Shape<infer T> ? T : never };
export interface MemberNodes {
  key: Node;
  value: Node;
}

/** The nodes that values were read from, for what is found out later. */
export type NodesOf<M extends Members> = { [K in keyof M]?: MemberNodes };

export interface ReadRecord<M extends Members> {
  values: ValuesOf<M>;
  /** Of each member that was there, also of one that was wrong. */
  nodes: NodesOf<M>;
  /** Nothing in it was wrong. */
  isWhole: boolean;
}

/** A mapping of known keys, each optional. @param others what to do instead of keys that other programs have, or that are missing here */
export function record<M extends Members>(
  description: string,
  shapes: M,
  others: ReadonlyMap<string, string> = new Map(),
): Shape<ReadRecord<M>> {
  return {
    schema: {
      type: "object",
      description,
      properties: Object.fromEntries(Object.entries(shapes).map(([key, { schema }]) => [key, schema])),
      additionalProperties: false,
    },
    read(node, path, reader) {
      const found = members(node, path, reader);
      if (found === undefined) return undefined;
      const values: Record<string, unknown> = {};
      const nodes: Record<string, MemberNodes> = {};
      let { isWhole } = found;
      for (const { key, keyNode, value } of found.members) {
        const shape = shapes[key];
        nodes[key] = { key: keyNode, value };
        if (shape === undefined) {
          const hint = others.get(key) ?? meant(key, Object.keys(shapes));
          reader.fail(keyNode, path, `'${key}' is not known`, hint);
          isWhole = false;
          continue;
        }
        const read = shape.read(value, path === "" ? key : `${path}.${key}`, reader);
        if (read === undefined) isWhole = false;
        else values[key] = read;
      }
      return { values: values as ValuesOf<M>, nodes: nodes, isWhole };
    },
  };
}

/** A record that counts as a whole, or not at all. */
export function whole<M extends Members>(of: Shape<ReadRecord<M>>): Shape<ValuesOf<M>> {
  return {
    schema: of.schema,
    read(node, path, reader) {
      const found = of.read(node, path, reader);
      return found?.isWhole === true ? found.values : undefined;
    },
  };
}

/** The first of them that can be one by its kind reads it: a scalar, a list or a mapping. */
export function either<A, B>(
  isFirst: (node: Node) => boolean,
  first: Shape<A>,
  second: Shape<B>,
): Shape<A | B> {
  return {
    schema: { anyOf: [first.schema, second.schema] },
    read: (node, path, reader) =>
      isFirst(node) ? first.read(node, path, reader) : second.read(node, path, reader),
  };
}

interface Member {
  key: string;
  keyNode: Node;
  value: Node;
}

interface FoundMembers {
  members: Member[];
  /** None was left out as wrong. */
  isWhole: boolean;
}

function members(node: Node, path: string, reader: Reader): FoundMembers | undefined {
  if (!isMap(node)) return reader.fail(node, path, `${shown(node)} is no mapping of keys to values`);
  const found: Member[] = [];
  const keys = new Set<string>();
  for (const { key: keyNode, value } of node.items as Pair<Node, Node | null>[]) {
    const key = scalarText(keyNode);
    const at = path === "" ? (key ?? "") : `${path}.${key ?? ""}`;
    const target = value === null ? undefined : resolved(value, reader);
    const isRepeated = key !== undefined && keys.has(key);
    if (key !== undefined) keys.add(key);
    if (key === undefined) reader.fail(keyNode, path, `${shown(keyNode)} is no key`);
    else if (isRepeated) reader.fail(keyNode, path, `'${key}' is given twice`, "leave one of them out");
    else if (isAlias(value) && target === undefined) {
      reader.fail(value, at, `*${value.source} names no anchor above it`);
    } else if (target === undefined || (isScalar(target) && target.value === null)) {
      reader.fail(keyNode, at, "has no value");
    } else found.push({ key, keyNode, value: target });
  }
  return { members: found, isWhole: found.length === node.items.length };
}

/** A mapping's key itself, where it has it. */
export function keyIn(node: Node, key: string): Node | undefined {
  const pairs = isMap(node) ? (node.items as Pair<Node>[]) : [];
  return pairs.find((pair) => scalarText(pair.key) === key)?.key;
}

export function shown(node: Node): string {
  if (isMap(node)) return "a mapping";
  if (isSeq(node)) return "a list";
  return `'${scalarText(node) ?? String(isScalar(node) ? node.value : node)}'`;
}

/** "a, b or c" */
export function listed(words: readonly string[]): string {
  return words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} or ${words.at(-1)}`;
}

/** Of a word's letters, what may be wrong in it. */
const NEAR = 0.4;

/** "did you mean X?" of the nearest known word, where one is near. */
export function meant(word: string, known: readonly string[]): string | undefined {
  const nearest = known
    .map((candidate) => ({ candidate, distance: distanceOf(word.toLowerCase(), candidate) }))
    .sort((a, b) => a.distance - b.distance)[0];
  if (nearest !== undefined && nearest.distance <= Math.max(1, Math.floor(word.length * NEAR))) {
    return `did you mean '${nearest.candidate}'?`;
  }
  return known.length === 0 || known.length > 12 ? undefined : `there are ${[...known].join(", ")}`;
}

const LONGEST_WORD = 64;

/** Levenshtein's: insertions, deletions, substitutions. */
function distanceOf(a: string, b: string): number {
  if (a.length > LONGEST_WORD || b.length > LONGEST_WORD) return LONGEST_WORD;
  let previous = Array.from({ length: b.length + 1 }, (_, index) => index);
  for (let i = 1; i <= a.length; i++) {
    const row = [i];
    for (let j = 1; j <= b.length; j++) {
      const isSame = a[i - 1] === b[j - 1];
      row[j] = Math.min(
        (previous[j] ?? 0) + 1,
        (row[j - 1] ?? 0) + 1,
        (previous[j - 1] ?? 0) + (isSame ? 0 : 1),
      );
    }
    previous = row;
  }
  return previous[b.length] ?? 0;
}
