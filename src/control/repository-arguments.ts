// drive-backup's arguments for a disk of a backup in a repository: `target` is the repository, `x-group` makes it one.
// Secrets are not sent: the server reads the files that have them.

import { BACKUP_LEVELS, type RepositoryPlace } from "../backup/options.js";
import { messageOf } from "../errors.js";
import { absoluteName } from "../file-names.js";
import { genericError, notSupported, type JsonObject } from "../qmp/protocol.js";
import { fileName, oneOf, optional, string, type Arguments } from "../qmp/schema.js";
import { checkDisk, checkGroup } from "../repository/format/names.js";
import { describeStore } from "../repository/store/describe-store.js";

const MAX_VM_CONFIG_CHARACTERS = 1024 * 1024;

export const REPOSITORY_ARGUMENTS = {
  "x-group": optional(string),
  "x-disk-name": optional(string),
  "x-level": optional(oneOf(BACKUP_LEVELS)),
  "x-key-file": optional(fileName),
  "x-passphrase-file": optional(fileName),
  "x-vm-config": optional(string),
};

type RepositoryArguments = Arguments<typeof REPOSITORY_ARGUMENTS> & { target: string };

/** What a repository has no use for. */
const USELESS = [
  "format",
  "mode",
  "bitmap",
  "bitmap-mode",
  "compress",
  "x-force",
  "x-cluster-size",
  "x-verify",
  "x-target-snapshot",
  "x-backing-file",
  "x-backing-format",
  "x-checkpoint",
  "x-since",
  "x-since-or-full",
] as const;

/**
 * Undefined where the target is no repository.
 * @param disk its node name @param tool name and version of this server
 * @throws QmpError GenericError for names that are none, and for what does not go with a repository
 */
export function repositoryFrom(
  args: RepositoryArguments & Record<string, unknown>,
  disk: string,
  tool: string,
): RepositoryPlace | undefined {
  const group = args["x-group"];
  if (group === undefined) {
    const stray = Object.keys(REPOSITORY_ARGUMENTS).find((name) => args[name] !== undefined);
    if (stray !== undefined) throw genericError(`'${stray}' needs 'x-group'`);
    return undefined;
  }
  const useless = USELESS.find((name) => args[name] !== undefined);
  if (useless !== undefined) throw notSupported(`'${useless}' with 'x-group'`);
  if (args["sync"] !== "full") throw notSupported(`'x-group' with sync mode '${String(args["sync"])}'`);
  if (args["on-target-error"] === "ignore") throw notSupported("'x-group' with on-target-error 'ignore'");
  const { "x-key-file": keyFile, "x-passphrase-file": passphraseFile, "x-vm-config": vmConfig } = args;
  if (keyFile !== undefined && passphraseFile !== undefined) {
    throw genericError("'x-key-file' does not go with 'x-passphrase-file'");
  }
  if (vmConfig !== undefined && vmConfig.length > MAX_VM_CONFIG_CHARACTERS) {
    throw genericError(`Parameter 'x-vm-config' expects at most ${MAX_VM_CONFIG_CHARACTERS} characters`);
  }
  try {
    const store = describeStore(args.target);
    return {
      address: store.kind === "folder" ? store.path : args.target,
      group: checkGroup(group),
      disk: checkDisk(args["x-disk-name"] ?? disk),
      level: args["x-level"] ?? "auto",
      keyFile: keyFile === undefined ? undefined : absoluteName(keyFile),
      passphraseFile: passphraseFile === undefined ? undefined : absoluteName(passphraseFile),
      vmConfig,
      tool,
    };
  } catch (error) {
    throw genericError(messageOf(error));
  }
}

/** What people are told that the backup is written to. */
export function repositoryTargetName({ address, group, disk }: RepositoryPlace): string {
  return `${address}::${group}/${disk}`;
}

export function argumentsFromRepository(place: RepositoryPlace | undefined): JsonObject {
  if (place === undefined) return {};
  return {
    // What the options have as defaults.
    ...Object.fromEntries(USELESS.map((name) => [name, undefined])),
    target: place.address,
    "x-group": place.group,
    "x-disk-name": place.disk,
    "x-level": place.level,
    "x-key-file": place.keyFile,
    "x-passphrase-file": place.passphraseFile,
    "x-vm-config": place.vmConfig,
  };
}
