// Addresses: REPO, and REPO::GROUP[/DISK][@TIME].

import { existsSync } from "node:fs";
import { absoluteName } from "../file-names.js";
import { CowcatcherError } from "../errors.js";
import { checkDisk, checkGroup } from "./format/names.js";

export interface BackupAddress {
  /** As openStore takes it. */
  repository: string;
  group: string;
  disk: string | undefined;
  /** A time or the beginning of one; "latest". */
  time: string;
}

const LATEST = "latest";
/** Other kinds of addresses, some of which have "::" in an IPv6 host. */
const OTHER = /^(?:nbds?(?:\+unix)?:|rbd:|null:|json:)/;

/** Whether it has the form of a backup's address, and is not a file of that name. */
export function isBackupAddress(text: string): boolean {
  return parts(text) !== undefined && !existsSync(text);
}

/** @throws CowcatcherError USAGE. */
export function parseBackupAddress(text: string): BackupAddress {
  const found = parts(text);
  if (found === undefined) {
    throw new CowcatcherError({
      code: "USAGE",
      object: text,
      problem: "is no address of a backup",
      hint: "give REPO::GROUP, REPO::GROUP/DISK or REPO::GROUP/DISK@TIME",
    });
  }
  const { repository, group, disk, time } = found;
  checkGroup(group);
  if (disk !== undefined) checkDisk(disk);
  return { repository, group, disk, time: time ?? LATEST };
}

function parts(
  text: string,
): { repository: string; group: string; disk: string | undefined; time: string | undefined } | undefined {
  const at = text.lastIndexOf("::");
  if (at < 0 || OTHER.test(text)) return undefined;
  const match = /^([^/@]+)(?:\/([^/@]+))?(?:@([^/@]+))?$/.exec(text.slice(at + 2));
  const repository = at === 0 ? (process.env["COWCATCHER_REPO"] ?? "") : text.slice(0, at);
  if (match?.[1] === undefined || repository === "") return undefined;
  return { repository, group: match[1], disk: match[2], time: match[3] };
}

/** For another process with another working folder. */
export function absoluteRepository(repository: string): string {
  return repository.startsWith("s3:") ? repository : absoluteName(repository);
}
