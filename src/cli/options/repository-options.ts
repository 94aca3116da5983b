// The options that say which repository, and what opens it. Secrets never stand on a command line: a key file and a
// passphrase file are named, or the environment has them.
import { existsSync } from "node:fs";
import type { Command } from "commander";
import type { KeySource } from "../../repository/format/keys.js";
import { environmentKey, keyFromFile, passphraseFromFile } from "../../repository/key-files.js";
import type { Environment } from "../output/context.js";
import { textOption, usageError } from "./options.js";

export interface KeyFlags {
  keyFile?: string;
  passphraseFile?: string;
}

export function addKeyOptions(command: Command): Command {
  return command
    .addOption(textOption("--key-file <FILE>", "key of an encrypted repository (COWCATCHER_KEY_FILE)"))
    .addOption(
      textOption(
        "--passphrase-file <FILE>",
        "file with the passphrase of an encrypted repository (COWCATCHER_PASSPHRASE_FILE, COWCATCHER_PASSPHRASE)",
      ),
    );
}

/**
 * What to open an encrypted repository with: options before the environment.
 * @throws CowcatcherError USAGE for two at once or a file that is no key; NOT_FOUND, IO.
 */
export function keySource(
  { keyFile, passphraseFile }: KeyFlags,
  environment: Environment = process.env,
): KeySource | undefined {
  if (keyFile !== undefined && passphraseFile !== undefined) {
    throw usageError("--key-file", "does not go with --passphrase-file", "give one of them");
  }
  if (keyFile !== undefined) return keyFromFile(keyFile);
  if (passphraseFile !== undefined) return passphraseFromFile(passphraseFile);
  return environmentKey(environment);
}

/** Asked for once a repository says that it is encrypted, and for one that is not. */
export function lazyKey(flags: KeyFlags): () => Promise<KeySource | undefined> {
  return async () => Promise.resolve(keySource(flags));
}

export interface RepositoryArguments {
  repository: string;
  /** GROUP, or GROUP@TIME, as it was given. */
  rest: string[];
}

/**
 * Tells REPO from what follows: `REPO`, `REPO GROUP`, `REPO::GROUP`, and `GROUP` alone where --repo or COWCATCHER_REPO
 * names the repository.
 * @throws CowcatcherError USAGE
 */
export function repositoryArguments(
  args: readonly string[],
  repo: string | undefined,
  environment: Environment = process.env,
): RepositoryArguments {
  if (repo !== undefined) return { repository: repo, rest: args.map(withoutRepository) };
  const [first, ...others] = args;
  const known = environment["COWCATCHER_REPO"];
  const fallback = known === "" ? undefined : known;
  if (first === undefined) return { repository: fallback ?? missing(), rest: [] };
  const at = first.lastIndexOf("::");
  if (at > 0 && !existsSync(first)) {
    return { repository: first.slice(0, at), rest: [first, ...others].map(withoutRepository) };
  }
  if (at === 0) return { repository: fallback ?? missing(), rest: args.map(withoutRepository) };
  const isName = /^[A-Za-z0-9][A-Za-z0-9._+-]*(?:@.*)?$/.test(first) && !existsSync(first);
  if (fallback !== undefined && isName) return { repository: fallback, rest: [...args] };
  return { repository: first, rest: others.map(withoutRepository) };
}

function withoutRepository(text: string): string {
  const at = text.lastIndexOf("::");
  return at < 0 ? text : text.slice(at + 2);
}

function missing(): never {
  throw usageError("REPO", "is missing", "give a folder or s3:https://HOST/BUCKET, or set COWCATCHER_REPO");
}
