// A job's TARGET: a path in which {group}, {disk} and {date} stand for what they are called.
//
// {date} is the backup's time in UTC, as 2026-11-28T020000Z: it sorts, and no file system minds it. It stands in the file's
// name, not in a folder's, so that all backups of a disk are in one folder: that is where the last one is looked for, and
// what retention walks.
import { dirname } from "node:path";
import { CowcatcherError } from "../errors.js";

export interface Pattern {
  text: string;
  /** A file that the backup makes; false: an export, an RBD image, null:, or a device, which are written in place. */
  isFile: boolean;
  hasDisk: boolean;
}

const FIELDS = ["group", "disk", "date"] as const;
const ADDRESS = /^(?:nbds?(?:\+unix)?:|rbd:|null:$)/;

/** @throws CowcatcherError USAGE */
export function parsePattern(text: string): Pattern {
  const unknown = [...text.matchAll(/\{([^{}]*)\}/g)].find(
    ([, field]) => !FIELDS.some((known) => known === field),
  );
  if (unknown !== undefined) {
    throw wrong(`${unknown[0]} stands for nothing`, "there are {group}, {disk} and {date}");
  }
  const hasDisk = text.includes("{disk}");
  if (ADDRESS.test(text)) {
    if (text.includes("{date}")) throw wrong("{date} in what is written in place", "leave it out");
    return { text, isFile: false, hasDisk };
  }
  // /dev/shm has files.
  if (text.startsWith("/dev/") && !text.includes("{date}")) {
    return { text, isFile: false, hasDisk };
  }
  if (!text.startsWith("/")) throw wrong(`'${text}' is not absolute`, "begin it with /");
  if (dirname(text).includes("{date}")) {
    throw wrong(
      "{date} stands in a folder's name",
      "all backups of a disk are in one folder: put it into the file's name",
    );
  }
  if (!text.includes("{date}")) {
    throw wrong(
      "has no {date}",
      "each backup is a file of its own, such as /backup/{group}/{disk}-{date}.qcow2",
    );
  }
  return { text, isFile: true, hasDisk };
}

function wrong(problem: string, hint: string): CowcatcherError {
  return new CowcatcherError({ code: "USAGE", object: "target", problem, hint });
}

export interface PatternValues {
  group: string;
  disk: string;
  date: string;
}

export function fillPattern({ text }: Pattern, { group, disk, date }: PatternValues): string {
  return text.replaceAll("{group}", group).replaceAll("{disk}", fileWord(disk)).replaceAll("{date}", date);
}

/** A disk may be called by a path in QEMU's device tree. */
function fileWord(disk: string): string {
  return disk.replace(/[^A-Za-z0-9._+-]/g, "_").replace(/^\.+/, "_");
}

/** 2026-11-28T020000Z */
export function dateWord(time: Date): string {
  return `${time.toISOString().slice(0, 19).replaceAll(":", "")}Z`;
}
