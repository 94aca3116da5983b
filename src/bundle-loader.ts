// How the installed program's files are loaded: as scripts that V8 need not compile, as scripts/build.mjs has kept beside
// each of them what V8 made of it (its code cache). Compiling was a third of a short command's time, and each thread did
// it again.
//
// What was kept is V8's own: of another version, or with other flags, it refuses it, and the file is compiled as ever.
// V8 tells a file from another one by its length alone, so a file and what was kept of it belong to one build: their name
// has a digest of the file's content. Any thread.

import { closeSync, fstatSync, openSync, readSync } from "node:fs";
import { Script } from "node:vm";

/** What stands before and after the text of a file. */
export const BODY = ["(function (exports, require, module, __filename, __dirname) { ", "\n})"] as const;

/** Parts of a file's name; of V8's version and the processor's kind, so that builds for several stand side by side. */
const CACHE_FOLDER = `code-cache/${process.versions.v8}-${process.arch}`;

/**
 * Modules of Node's that are loaded when something of theirs is first used: a short command uses few of what it imports,
 * and they would take it a tenth of its time.
 */
const LOADED_LATE: ReadonlySet<string> = new Set([
  ...["node:child_process", "node:crypto", "node:dns", "node:dns/promises", "node:fs/promises", "node:http"],
  ...[
    "node:https",
    "node:net",
    "node:os",
    "node:readline",
    "node:stream",
    "node:stream/promises",
    "node:tls",
  ],
  ...["node:tty", "node:worker_threads", "node:zlib"],
]);

/** Most files of a bundle are smaller. */
const SCRATCH_BYTES_MIN = 256 * 1024;

/** What a file is: this function, and nothing else. */
type Body = (
  exports: object,
  require: NodeJS.Require,
  module: { exports: object },
  fileName: string,
  folder: string,
) => void;

/**
 * What loads CommonJS files in `folder`, named as `./file.cjs`, each once: ASCII text, in the function that Node would put
 * around it (BODY). All other names go to `requireOther`.
 * @param place the folder as stack traces have it, wherever the package stands: V8 keeps the name it was given first
 * @throws what a file throws, and what reading it does.
 */
export function bundleLoader(place: string, folder: string, requireOther: NodeJS.Require): NodeJS.Require {
  const modules = new Map<string, { exports: object }>();
  const load = (id: string): unknown => {
    const known = modules.get(id);
    if (known !== undefined) return known.exports;
    if (LOADED_LATE.has(id)) {
      const late = lateModule(() => requireOther(id) as object);
      modules.set(id, { exports: late });
      return late;
    }
    if (!id.startsWith("./")) return requireOther(id) as unknown;
    const name = id.slice(2);
    const file = `${folder}/${name}`;
    const body = compile(file, `${place}/${name}`, `${folder}/${CACHE_FOLDER}/${name}`);
    const module = { exports: {} };
    modules.set(id, module);
    try {
      body(module.exports, requireBundled, module, file, folder);
    } catch (error) {
      modules.delete(id);
      throw error;
    }
    return module.exports;
  };
  const requireBundled = Object.assign(load, requireOther);
  return requireBundled;
}

function compile(file: string, filename: string, cacheFile: string): Body {
  // Latin-1 takes a byte a character, in V8 as well.
  const source = read(file).toString("latin1");
  const cachedData = readIfThere(cacheFile);
  return new Script(source, { filename, cachedData }).runInThisContext() as Body;
}

/** Undefined for want of descriptors as well: then the next file says so. */
function readIfThere(file: string): Buffer | undefined {
  try {
    return read(file);
  } catch {
    return undefined;
  }
}

/** Of all files in turn: memory that is new to the process costs more than to read into it. */
let scratch = Buffer.alloc(0);

/** The file's bytes, until the next call. */
function read(file: string): Buffer {
  const fd = openSync(file, "r");
  try {
    const { size } = fstatSync(fd);
    if (scratch.length < size) scratch = Buffer.allocUnsafeSlow(Math.max(size, SCRATCH_BYTES_MIN));
    let length = 0;
    while (length < size) {
      const count = readSync(fd, scratch, length, size - length, length);
      if (count === 0) break;
      length += count;
    }
    return scratch.subarray(0, length);
  } finally {
    closeSync(fd);
  }
}

/** Stands for a module's exports, and loads it when it is first asked for one of them. */
function lateModule(load: () => object): object {
  let loaded: object | undefined;
  const exports = (): object => (loaded ??= load());
  return new Proxy(
    {},
    {
      get: (_, name): unknown => Reflect.get(exports(), name),
      has: (_, name) => Reflect.has(exports(), name),
      ownKeys: () => Reflect.ownKeys(exports()),
      getOwnPropertyDescriptor(_, name) {
        const descriptor = Reflect.getOwnPropertyDescriptor(exports(), name);
        // A proxy may not call a property fixed that its own target has not.
        return descriptor && { ...descriptor, configurable: true };
      },
    },
  );
}
