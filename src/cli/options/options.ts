// Parsers of option values and arguments. Each throws a typed usage error that names the option, so that
// commander's own wording never reaches the user.
import { existsSync } from "node:fs";
import { Option } from "commander";
import { MAX_PAGE_MEMORY_BYTES } from "../../cow/buffer-limit.js";
import { CowcatcherError } from "../../errors.js";
import { absoluteName, isFolderless, systemName } from "../../file-names.js";
import { IMAGE_FORMATS, type ImageFormat } from "../../block/format.js";
import { formatNbdUri, isNbdUri, isOldNbdName, parseNbdUri, parseOldNbdName } from "../../nbd/wire/uri.js";
import { absoluteRbdAddress, isRbdAddress, parseRbdAddress } from "../../rbd/address.js";
import { isBackupAddress, parseBackupAddress } from "../../repository/address.js";
import { GiB, parseDurationMs, parseSize } from "../../units.js";

export function usageError(object: string, problem: string, hint?: string): CowcatcherError {
  return new CowcatcherError({ code: "USAGE", object, problem, hint });
}

export function unsupported(object: string, problem: string, hint?: string): CowcatcherError {
  return new CowcatcherError({ code: "UNSUPPORTED", object, problem, hint });
}

/** "a, b or c" */
export function listWords(words: readonly string[]): string {
  return words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} or ${words.at(-1)}`;
}

/** The option's long name, which errors use: "--workers" of "-w, --workers <N>". */
function longName(flags: string): string {
  return /--[\w-]+/.exec(flags)?.[0] ?? flags;
}

/** A path; "-" means nothing here. @throws CowcatcherError USAGE, from its parser. */
export function pathOption(flags: string, help: string): Option {
  const name = longName(flags);
  return new Option(flags, help).argParser((text) => {
    if (text === STDIO)
      throw usageError(name, "- means standard input or output", "a file of this name is ./-");
    return needingNoFolder(parseText(text, name));
  });
}

/** As pathOption, each time that it is given one more. */
export function repeatedPath(flags: string, help: string): Option {
  const one = pathOption(flags, help).parseArg as (text: string, previous: undefined) => string;
  return new Option(flags, help).argParser((text, previous: string[] | undefined) => [
    ...(previous ?? []),
    one(text, undefined),
  ]);
}

/** The name. @throws CowcatcherError NOT_FOUND for one that is relative to a folder that is no more. */
function needingNoFolder(path: string): string {
  if (isFolderless()) absoluteImage(path);
  return path;
}

/** A name. An empty one is a variable of a script that was not set, never what was meant. */
export function textOption(flags: string, help: string): Option {
  const name = longName(flags);
  return new Option(flags, help).argParser((text) => parseText(text, name));
}

/** @throws CowcatcherError USAGE for an empty text. */
export function parseText(text: string, object: string): string {
  if (text === "") throw usageError(object, "is empty");
  return text;
}

export function sizeOption(flags: string, help: string): Option {
  const name = longName(flags);
  return new Option(flags, help).argParser((text) => parseSize(text, name));
}

/** The size of a copy-before-write buffer. More than can ever be allocated is refused here, not at the first job. */
export function bufferSizeOption(flags: string, help: string): Option {
  const name = longName(flags);
  return new Option(flags, help).argParser((text) => {
    const bytes = parseSize(text, name);
    if (bytes <= MAX_PAGE_MEMORY_BYTES) return bytes;
    throw usageError(
      name,
      `${text} is more than a buffer can have`,
      `give ${MAX_PAGE_MEMORY_BYTES / GiB}G at most`,
    );
  });
}

/** A duration in milliseconds. */
export function durationOption(flags: string, help: string): Option {
  const name = longName(flags);
  return new Option(flags, help).argParser((text) => parseDurationMs(text, name));
}

export interface CountBounds {
  min: number;
  max: number;
}

export function parseCount(text: string, object: string, { min, max }: CountBounds): number {
  const count = /^\d+$/.test(text) ? Number(text) : NaN;
  if (!(count >= min && count <= max)) {
    throw usageError(object, `'${text}' is not a number from ${min} to ${max}`);
  }
  return count;
}

export function countOption(flags: string, help: string, bounds: CountBounds): Option {
  const name = longName(flags);
  return new Option(flags, help).argParser((text) => parseCount(text, name, bounds));
}

export function parseChoice<T extends string>(text: string, object: string, choices: readonly T[]): T {
  const found = choices.find((choice) => choice === text);
  if (found === undefined) throw usageError(object, `'${text}' is not known`, `give ${listWords(choices)}`);
  return found;
}

export function choiceOption(flags: string, help: string, choices: readonly string[]): Option {
  const name = longName(flags);
  return new Option(flags, help).argParser((text) => parseChoice(text, name, choices));
}

export function formatOption(flags: string, help: string): Option {
  return choiceOption(flags, help, IMAGE_FORMATS);
}

export function forceShareOption(): Option {
  return new Option("-U, --force-share", "open the image although another program may write it");
}

export { isNbdUri, isRbdAddress };

/** "null:" throws data away, as in nbdcopy. */
export const NULL_TARGET = "null:";

/** Standard input as SOURCE, standard output as TARGET, as in most tools; nowhere a file of this name. */
export const STDIO = "-";

/** @throws CowcatcherError USAGE for "-", where it means nothing. */
export function refuseStdio(
  text: string,
  problem = "means standard input or output, which cannot be used here",
): void {
  if (text === STDIO) throw usageError(text, problem, "a file of this name is ./-");
}

/**
 * A path, an NBD URI or the address of an RBD image; QEMU's older form of a URI becomes one.
 * @throws CowcatcherError USAGE for an empty text, "-" or a wrong address, UNSUPPORTED for vsock.
 */
export function parseImage(text: string, argument = "IMAGE"): string {
  refuseStdio(text);
  if (isOldNbdName(text) && !existsSync(systemName(text))) return formatNbdUri(parseOldNbdName(text));
  if (isNbdUri(text)) parseNbdUri(text);
  if (isRbdAddress(text)) parseRbdAddress(text);
  if (text === "") throw usageError(argument, "is empty", "give the path of an image, or an NBD URI");
  if (isBackupAddress(text)) {
    if (argument === "TARGET") {
      throw usageError(text, "is a backup, which is never written by name", "give --repo and --group");
    }
    parseBackupAddress(text);
  } else {
    refuseForeignAddress(text);
    needingNoFolder(text);
  }
  return text;
}

/**
 * Addresses in QEMU's own forms and of storage that is not known here. Taken for paths they would lead to an error
 * that puzzles, and as a TARGET to a file in the working folder of which nobody knows.
 */
const FOREIGN_ADDRESS =
  /^(?:json:|null:|nbd:|file:|fd:|https?:|ftps?:|ssh:|sftp:|s3:|rbd:|iscsi:|nfs:|gluster[a-z+]*:|nvme:|host_device:)/i;

function refuseForeignAddress(text: string): void {
  if (
    isNbdUri(text) ||
    isRbdAddress(text) ||
    text === NULL_TARGET ||
    !FOREIGN_ADDRESS.test(text) ||
    existsSync(systemName(text))
  )
    return;
  throw usageError(
    text,
    "is an address of a kind that is not known here",
    `give a path or nbd://HOST[:PORT]/EXPORT; a file of this name is ./${text}`,
  );
}

/** A path, not an NBD URI. @throws CowcatcherError UNSUPPORTED for a URI, USAGE for an empty text. */
export function parseLocalImage(text: string): string {
  refuseExport(text);
  const image = parseImage(text);
  refuseExport(image);
  return image;
}

/** What is only named in an image may be a name in QEMU's own form. @throws CowcatcherError UNSUPPORTED for a URI. */
export function refuseExport(text: string): void {
  if (isNbdUri(text))
    throw unsupported(text, "an NBD export is not possible here", "give the path of an image");
  if (isRbdAddress(text))
    throw unsupported(text, "an RBD image is not possible here", "give the path of an image");
}

/** For another process with another working folder: paths are made absolute, also those within a URI. */
export function absoluteImage(text: string): string {
  if (isRbdAddress(text)) return absoluteRbdAddress(text);
  if (!isNbdUri(text)) return absoluteName(text);
  const address = parseNbdUri(text);
  const { tls } = address;
  const absolute = (path: string | undefined): string | undefined =>
    path === undefined ? undefined : absoluteName(path);
  return formatNbdUri({
    ...address,
    ...("path" in address && { path: absoluteName(address.path) }),
    ...(tls !== undefined && {
      tls: { ...tls, certificates: absolute(tls.certificates), pskFile: absolute(tls.pskFile) },
    }),
  });
}

const FORMAT_OF_EXTENSION = new Map<string, ImageFormat>([
  ["raw", "raw"],
  ["img", "raw"],
  ["qcow2", "qcow2"],
  ["qcow", "qcow2"],
]);

/** The format that a target's extension says, if it says one. */
export function formatByExtension(path: string): ImageFormat | undefined {
  // What an export is called says nothing of it: it is written as it is.
  if (isNbdUri(path)) return "raw";
  const extension = /\.([^./]+)$/.exec(path)?.[1]?.toLowerCase();
  return extension === undefined ? undefined : FORMAT_OF_EXTENSION.get(extension);
}
