// What all actions on repositories share: opening one, finding a backup in it.
import { CowcatcherError } from "../../errors.js";
import { parseBackupAddress } from "../../repository/address.js";
import { type BackupEntry, Repository } from "../../repository/repository.js";
import { usageError } from "../options/options.js";
import { type KeyFlags, lazyKey } from "../options/repository-options.js";

export interface RepoFlags extends KeyFlags {
  repo?: string;
  dryRun?: boolean;
  toKeyFile?: string;
  toPassphraseFile?: string;
}

export function refuseRest(rest: readonly string[]): void {
  if (rest[0] !== undefined) throw usageError(rest[0], "is one argument too many");
}

/** Opens it, does the work, closes it. */
export async function withRepository<T>(
  address: string,
  flags: RepoFlags,
  work: (repository: Repository) => Promise<T>,
): Promise<T> {
  const repository = await Repository.open(address, lazyKey(flags));
  try {
    return await work(repository);
  } finally {
    repository.close();
  }
}

/** Also one whose manifest cannot be read. @throws CowcatcherError NOT_FOUND, USAGE */
export async function findEntry(repository: Repository, name: string): Promise<BackupEntry> {
  const { group, time } = parseBackupAddress(`${repository.name}::${name}`);
  const entries = await repository.backups(group);
  const fits =
    time === "latest"
      ? entries.slice(-1)
      : entries.filter((entry) => entry.time.startsWith(time.replace(/Z$/, "")));
  const [only, other] = fits;
  if (only !== undefined && other === undefined) return only;
  if (other !== undefined)
    throw usageError(name, `fits ${fits.length} backups`, `give more of the time: ${other.time}`);
  throw new CowcatcherError({
    code: "NOT_FOUND",
    object: `${repository.name}::${name}`,
    problem: "there is no such backup",
    hint: "see repo list",
  });
}
