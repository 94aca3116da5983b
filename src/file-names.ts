// File names as they are: bytes.
//
// A name on Linux is any bytes but "/" and zero; JavaScript's text is Unicode. Decoded as UTF-8 in the ordinary way,
// a byte that is none becomes U+FFFD, and the text names another file. Here such a byte B becomes the lone surrogate
// U+DC00 + B instead, which no UTF-8 decodes to, and becomes B again where the name goes to the system (PEP 383 has
// the idea). In between a name is text like any other: it can be cut at slashes, compared, put into a message to
// another thread and into JSON (as "\udce9").
//
//   from outside      bytes of a header, /proc, readlink, realpath …  ──decodeName──►  text
//   to the system     text  ──systemName──►  the text itself if all of it is Unicode, else its bytes
//   to people         text  ──printableName──►  "caf\xe9"
//
// Paths are put together without being normalised: "link/../a" is what the kernel makes of it, which is not "a" where
// `link` is a symbolic link.
//
// Any thread.

import { isUtf8 } from "node:buffer";
import { readFileSync, readlinkSync } from "node:fs";
import { removedFolder } from "./errors.js";

const ESCAPED = /[\udc80-\udcff]/gu;
const ESCAPE_BASE = 0xdc00;

/** The name that the bytes are. Inverse of `nameBytes`. */
export function decodeName(bytes: Buffer): string {
  if (isUtf8(bytes)) return bytes.toString("utf8");
  let text = "";
  for (let at = 0; at < bytes.length;) {
    const length = sequenceBytes(bytes, at);
    text +=
      length === 0
        ? String.fromCharCode(ESCAPE_BASE + (bytes[at] ?? 0))
        : bytes.toString("utf8", at, at + length);
    at += Math.max(1, length);
  }
  return text;
}

/** Length of the character at `at`; 0: none begins there. */
function sequenceBytes(bytes: Buffer, at: number): number {
  const lead = bytes[at] ?? 0;
  const length = lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
  return at + length <= bytes.length && isUtf8(bytes.subarray(at, at + length)) ? length : 0;
}

/** The bytes of a name. */
export function nameBytes(name: string): Buffer {
  const parts: Buffer[] = [];
  let from = 0;
  for (const { index, 0: escaped } of name.matchAll(ESCAPED)) {
    parts.push(Buffer.from(name.slice(from, index)), Buffer.of(escaped.charCodeAt(0) - ESCAPE_BASE));
    from = index + 1;
  }
  return Buffer.concat([...parts, Buffer.from(name.slice(from))]);
}

/** Whether all of the name is Unicode, so that text says it. */
export function isTextName(name: string): boolean {
  return name.search(ESCAPED) < 0;
}

/** For Node's file system calls: which file the name means. */
export function systemName(name: string): string | Buffer {
  return isTextName(name) ? name : nameBytes(name);
}

/** For people: bytes that are no text as \xHH. */
export function printableName(name: string): string {
  return name.replace(ESCAPED, (escaped) => `\\x${(escaped.charCodeAt(0) - ESCAPE_BASE).toString(16)}`);
}

/** Set when the process has left the folder that it was started in; `folder` undefined: that was removed before. */
let left: { readonly folder: string | undefined } | undefined;

/**
 * Goes to "/", for good: a thread of Node's cannot start in a folder that was removed, and a server outlives its folder.
 * Relative names mean what they meant before, by `absoluteName`; nothing else may take one from here on. Main thread.
 */
export function leaveWorkingFolder(): void {
  if (left !== undefined) return;
  let folder: string | undefined;
  try {
    folder = workingFolder();
  } catch {
    // It was removed: what needs it is told so.
  }
  process.chdir("/");
  left = { folder };
}

/** Whether relative names mean nothing, as the process was started in a folder that was removed. */
export function isFolderless(): boolean {
  return left !== undefined && left.folder === undefined;
}

/**
 * The folder that the process was started in.
 * @throws CowcatcherError NOT_FOUND where it was removed (or Node's own error, before `leaveWorkingFolder`).
 */
export function workingFolder(): string {
  if (left?.folder !== undefined) return left.folder;
  if (left !== undefined) throw removedFolder();
  const folder = process.cwd();
  // Node decodes what the system says; for bytes that are no text the kernel is asked again.
  return folder.includes("\uFFFD")
    ? decodeName(readlinkSync("/proc/self/cwd", { encoding: "buffer" }))
    : folder;
}

/** The same file for another process, or when the working folder is another. An absolute name needs no folder. */
export function absoluteName(name: string): string {
  return withoutDots(name.startsWith("/") ? name : `${workingFolder()}/${name}`);
}

/** The file that `name` means when it is written in, or said of, the file `ofFile`. */
export function besides(ofFile: string, name: string): string {
  return name.startsWith("/") ? name : ofFile.slice(0, ofFile.lastIndexOf("/") + 1) + withoutDots(name);
}

/** Repeated slashes and "." mean nothing anywhere; ".." may, and so may a slash at the end. */
function withoutDots(name: string): string {
  return name.replace(/^(?:\.\/+)+/, "").replace(/\/(?:\.?\/)+/g, "/");
}

/** The arguments as the process was given them, where Node has made U+FFFD of some of their bytes. */
export function exactArguments(decoded: readonly string[]): string[] {
  if (!decoded.some((argument) => argument.includes("\uFFFD"))) return [...decoded];
  try {
    const all = readFileSync("/proc/self/cmdline").toString("latin1").split("\0").slice(0, -1);
    const own = all.slice(-decoded.length).map((argument) => Buffer.from(argument, "latin1"));
    // Whoever changes a process's title changes this file; then it is of no use.
    const isSame =
      own.length === decoded.length && own.every((bytes, i) => bytes.toString("utf8") === decoded[i]);
    if (isSame) return own.map(decodeName);
  } catch {
    // No /proc.
  }
  return [...decoded];
}
