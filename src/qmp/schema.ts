// Argument schemas of commands, and the check of a request against them, with QEMU's messages.
//
// As in QEMU, members are visited in the schema's order, so that a missing or mistyped one is named first, and
// members that the schema does not have are refused last. A path ("x-perf.max-workers", "actions[0].data.sync")
// names nested members.

import { genericError, isJsonObject } from "./protocol.js";

/** Checks a value and returns it typed. @throws QmpError GenericError naming `path`. */
export interface Type<T> {
  check(value: unknown, path: string): T;
}

export interface Optional<T> extends Type<T | undefined> {
  readonly optional: true;
}

export type Members = Record<string, Type<unknown>>;

type OptionalKeys<M extends Members> = {
  [K in keyof M]: M[K] extends Optional<unknown> ? K : never;
}[keyof M];
type Checked<T> = T extends Type<infer U> ? U : never;
/** What a handler gets for a schema. */
export type Arguments<M extends Members> = { [K in Exclude<keyof M, OptionalKeys<M>>]: Checked<M[K]> } & {
  [K in OptionalKeys<M>]?: Checked<M[K]>;
};

function wrongType(path: string, expected: string): Error {
  return genericError(`Invalid parameter type for '${path}', expected: ${expected}`);
}

export const string: Type<string> = {
  check(value, path) {
    if (typeof value !== "string") throw wrongType(path, "string");
    return value;
  },
};

/** A lone surrogate, but for those that stand for a byte that is no text (src/file-names.ts). */
const NO_NAME = /[\ud800-\udc7f\udd00-\udfff]/u;

/** A file's name. Node would write U+FFFD for what is no text, and so mean another file. */
export const fileName: Type<string> = {
  check(value, path) {
    const name = string.check(value, path);
    if (name.includes("\0")) throw genericError(`Parameter '${path}' must not contain a NUL character`);
    if (NO_NAME.test(name)) throw genericError(`Parameter '${path}' is not Unicode: it has a lone surrogate`);
    return name;
  },
};

export const boolean: Type<boolean> = {
  check(value, path) {
    if (typeof value !== "boolean") throw wrongType(path, "boolean");
    return value;
  },
};

export const integer: Type<number> = {
  check(value, path) {
    if (typeof value !== "number" || !Number.isSafeInteger(value)) throw wrongType(path, "integer");
    return value;
  },
};

/** A count, a number of bytes or of milliseconds: an integer from 0 to `max`. */
export function upTo(max: number): Type<number> {
  return {
    check(value, path) {
      const number = integer.check(value, path);
      if (number < 0) throw genericError(`Parameter '${path}' expects a non-negative value`);
      if (number > max) throw genericError(`Parameter '${path}' expects a value of ${max} at most`);
      return number;
    },
  };
}

/** The same from 1 on: of what 0 would make no sense. */
export function positiveUpTo(max: number): Type<number> {
  return {
    check(value, path) {
      const number = integer.check(value, path);
      if (number < 1) throw genericError(`Parameter '${path}' expects a positive value`);
      return upTo(max).check(number, path);
    },
  };
}

export const size = upTo(Number.MAX_SAFE_INTEGER);

/** One of these texts. */
export function oneOf<const T extends string>(values: readonly T[]): Type<T> {
  return {
    check(value, path) {
      const text = string.check(value, path);
      const found = values.find((candidate) => candidate === text);
      // QEMU names the last member alone here, unlike everywhere else.
      const leaf = path.slice(path.lastIndexOf(".") + 1);
      if (found === undefined) throw genericError(`Parameter '${leaf}' does not accept value '${text}'`);
      return found;
    },
  };
}

/** An array of that type. */
export function list<T>(element: Type<T>): Type<T[]> {
  return {
    check(value, path) {
      if (!Array.isArray(value)) throw wrongType(path, "array");
      return value.map((entry, index) => element.check(entry, `${path}[${index}]`));
    },
  };
}

/** An object of these members and no others. */
export function object<M extends Members>(members: M): Type<Arguments<M>> {
  return {
    check(value, path) {
      if (!isJsonObject(value)) throw wrongType(path, "object");
      return checkMembers(value, members, path);
    },
  };
}

/** Any object: its members are checked later, when it is known which they may be. */
export const anyObject: Type<Record<string, unknown>> = {
  check(value, path) {
    if (!isJsonObject(value)) throw wrongType(path, "object");
    return value;
  },
};

/** A member that may be left out. */
export function optional<T>(type: Type<T>): Optional<T> {
  return { optional: true, check: (value, path) => type.check(value, path) };
}

/** Checks a command's arguments (`path` "") or a nested object's members. */
export function checkMembers<M extends Members>(
  value: Record<string, unknown>,
  members: M,
  path = "",
): Arguments<M> {
  const prefix = path === "" ? "" : `${path}.`;
  const checked: Record<string, unknown> = {};
  for (const [name, type] of Object.entries(members)) {
    if (Object.hasOwn(value, name)) checked[name] = type.check(value[name], prefix + name);
    else if (!("optional" in type)) throw genericError(`Parameter '${prefix}${name}' is missing`);
  }
  for (const name of Object.keys(value)) {
    if (!Object.hasOwn(members, name)) throw genericError(`Parameter '${prefix}${name}' is unexpected`);
  }
  return checked as Arguments<M>;
}
