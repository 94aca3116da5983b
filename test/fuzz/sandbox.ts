// What a hostile image may name, and who notices when it is touched.
//
// Import this module before anything that imports node:fs, so that its watch on opens and connections is what all
// other modules see. A folder per seed holds the mutants; `lib` beside them holds chains that loop or are too deep,
// and files that are no image. Opens are recorded with their flags, and judged by the case that caused them.

import * as childProcess from "node:child_process";
import fs from "node:fs";
import { syncBuiltinESMExports } from "node:module";
import net from "node:net";
import * as path from "node:path";
import type { HostileNames } from "./qcow2-mutations.js";

export interface Touch {
  /** A path, or "connect" and an address. */
  what: string;
  writes: boolean;
}

const touches: Touch[] = [];

/** What was opened since the last call. */
export function takeTouches(): Touch[] {
  return touches.splice(0);
}

function note(target: unknown, flags: unknown): void {
  const writes =
    typeof flags === "number"
      ? (flags & (fs.constants.O_WRONLY | fs.constants.O_RDWR)) !== 0
      : typeof flags === "string" && flags !== "r";
  touches.push({ what: String(target), writes });
}

/** Puts a note before each call of a function of a module. */
function watch<T extends object>(
  module: T,
  name: keyof T & string,
  noteCall: (args: unknown[]) => void,
): void {
  const original = Reflect.get(module, name) as (...args: unknown[]) => unknown;
  const watched = function (this: unknown, ...args: unknown[]): unknown {
    noteCall(args);
    return original.apply(this, args);
  };
  Reflect.set(module, name, watched);
}

/** From now on every open and every connection of this process is recorded. */
export function watchProcess(): void {
  for (const name of ["open", "openSync"] as const) watch(fs, name, ([target, flags]) => note(target, flags));
  watch(fs.promises, "open", ([target, flags]) => note(target, flags));
  for (const name of [
    "readFile",
    "readFileSync",
    "createReadStream",
    "opendirSync",
    "readdirSync",
  ] as const) {
    watch(fs, name, ([target]) => {
      // Node itself reads modules that are imported late.
      if (typeof target === "string" && !/\.[cm]?js$/.test(target)) note(target, "r");
    });
  }
  watch(net.Socket.prototype, "connect", ([options]) => note(`connect ${JSON.stringify(options)}`, "r"));
  syncBuiltinESMExports();
}

const CHAIN_DEPTHS = [150, 220];

/** Fills `root`/lib. */
export function makeLibrary(root: string): void {
  const lib = path.join(root, "lib");
  fs.mkdirSync(lib);
  const at = (name: string): string => path.join(lib, name);
  fs.writeFileSync(at("raw.img"), Buffer.alloc(300_000, "raw"));
  fs.writeFileSync(at("short.img"), "x");
  fs.writeFileSync(at("empty.img"), "");
  fs.writeFileSync(at("vmdk.img"), Buffer.concat([Buffer.from("KDMV"), Buffer.alloc(600)]));
  fs.mkdirSync(at("folder"));
  childProcess.execFileSync("mkfifo", [at("fifo")]);
  fs.symlinkSync("nowhere", at("dangling"));
  fs.symlinkSync("link-b", at("link-a"));
  fs.symlinkSync("link-a", at("link-b"));
  fs.writeFileSync(at("loop-a.qcow2"), smallQcow2("loop-b.qcow2"));
  fs.writeFileSync(at("loop-b.qcow2"), smallQcow2("loop-a.qcow2"));
  for (const depth of CHAIN_DEPTHS) {
    for (let index = 0; index < depth; index++) {
      const below = index + 1 < depth ? `deep-${depth}-${index + 1}.qcow2` : "raw.img";
      fs.writeFileSync(at(`deep-${depth}-${index}.qcow2`), smallQcow2(below));
    }
  }
}

/** A version 2 image without clusters, on a backing file. */
function smallQcow2(backing: string): Buffer {
  const bytes = Buffer.alloc(4 * 512);
  bytes.writeUInt32BE(0x514649fb, 0);
  bytes.writeUInt32BE(2, 4);
  bytes.writeBigUInt64BE(80n, 8);
  bytes.writeUInt32BE(backing.length, 16);
  bytes.writeUInt32BE(9, 20);
  bytes.writeBigUInt64BE(32768n, 24);
  bytes.writeUInt32BE(1, 36);
  bytes.writeBigUInt64BE(512n, 40);
  bytes.writeBigUInt64BE(1024n, 48);
  bytes.writeUInt32BE(1, 56);
  bytes.write(backing, 80);
  bytes.writeBigUInt64BE(1536n, 1024);
  for (let cluster = 0; cluster < 4; cluster++) bytes.writeUInt16BE(1, 1536 + cluster * 2);
  return bytes;
}

/** `mutant` is the name of the file that carries the names. */
export function hostileNames(root: string, mutant: string): HostileNames {
  const lib = path.join(root, "lib");
  const shared = [
    mutant,
    `./${mutant}`,
    "../lib/raw.img",
    "../lib/short.img",
    "../lib/empty.img",
    "../lib/missing.img",
    "../lib/vmdk.img",
    "../lib/folder",
    "../lib/fifo",
    "../lib/dangling",
    "../lib/link-a",
    `${lib}/raw.img`,
    "/dev/zero",
    "/dev/null",
    "/dev/tty",
    "/proc/self/mem",
    "/proc/self/environ",
    "/etc/passwd",
    "file:../lib/raw.img",
    `file:${lib}/raw.img`,
    "raw:../lib/raw.img",
    "host_device:/dev/zero",
    "nbd://127.0.0.1:1/x",
    "nbd:127.0.0.1:1",
    "nbd+unix:///x?socket=/nonexistent",
    "ssh://127.0.0.1:1/x",
    "http://127.0.0.1:1/x",
    "fat:rw:/",
    "blkdebug::x",
    "json:",
    "json:{",
    "json:[]",
    "json:null",
    'json:{"driver":"file"}',
    'json:{"driver":"raw","file":{"driver":"file","filename":"/etc/passwd"}}',
    `json:{"driver":"qcow2","file.driver":"file","file.filename":"${lib}/loop-a.qcow2"}`,
    'json:{"driver":"nbd","server":{"type":"unix","path":"/nonexistent"}}',
    `json:${"[".repeat(900)}`,
    'json:{"__proto__":{"driver":"file"},"file":null}',
    "\0",
    "a\0b",
    "",
    ".",
    "..",
    "/",
    "a".repeat(300),
    "b/".repeat(400),
    "\xff\xfe",
    "line\nbreak",
    "\x1b[31mred",
  ];
  const chains = [
    "../lib/loop-a.qcow2",
    `${lib}/loop-b.qcow2`,
    ...CHAIN_DEPTHS.map((depth) => `../lib/deep-${depth}-0.qcow2`),
  ];
  return { backing: [...shared, ...chains], dataFile: shared };
}
