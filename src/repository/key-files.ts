// What a repository is opened with, from files. Blocks: on a thread that serves nobody, or before anything is served.

import { readFileSync } from "node:fs";
import { CowcatcherError, ioError } from "../errors.js";
import { absoluteName } from "../file-names.js";
import { checkKeyFile, type KeySource, MAX_KEY_FILE_BYTES } from "./format/keys.js";

/** @throws CowcatcherError USAGE for a file that is no key; NOT_FOUND, IO. */
export function keyFromFile(path: string): KeySource {
  const content = readSmallFile(path);
  checkKeyFile(path, content);
  return { kind: "file", path, content };
}

/** The file's first line. @throws CowcatcherError USAGE where it is empty; NOT_FOUND, IO. */
export function passphraseFromFile(path: string): KeySource {
  const passphrase = readSmallFile(path).toString("utf8").split(/\r?\n/)[0] ?? "";
  if (passphrase === "") throw unfit(path, "has no passphrase in its first line");
  return { kind: "passphrase", passphrase };
}

/** What the environment has. @throws CowcatcherError as keyFromFile */
export function environmentKey(environment: NodeJS.ProcessEnv): KeySource | undefined {
  const {
    COWCATCHER_KEY_FILE: file,
    COWCATCHER_PASSPHRASE_FILE: textFile,
    COWCATCHER_PASSPHRASE: passphrase,
  } = environment;
  if (file !== undefined && file !== "") return keyFromFile(file);
  if (textFile !== undefined && textFile !== "") return passphraseFromFile(textFile);
  if (passphrase !== undefined && passphrase !== "") return { kind: "passphrase", passphrase };
  return undefined;
}

function readSmallFile(path: string): Buffer {
  try {
    const content = readFileSync(absoluteName(path));
    if (content.length > MAX_KEY_FILE_BYTES) throw unfit(path, "is too large for a key or a passphrase");
    return content;
  } catch (error) {
    throw ioError("read", path, error);
  }
}

function unfit(object: string, problem: string): CowcatcherError {
  return new CowcatcherError({ code: "USAGE", object, problem });
}
