// Parsers of option values and arguments. Each throws a typed usage error that names the option, so that
// commander's own wording never reaches the user.
import { Option } from "commander";
import { CowcatcherError } from "../errors.js";
import { IMAGE_FORMATS, type ImageFormat } from "../image/format.js";
import { parseDurationMs, parseSize } from "../units.js";

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

export function sizeOption(flags: string, help: string): Option {
  const name = longName(flags);
  return new Option(flags, help).argParser((text) => parseSize(text, name));
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

const NBD_URI = /^nbds?(?:\+unix|\+vsock)?:\/\//i;

export function isNbdUri(text: string): boolean {
  return NBD_URI.test(text);
}

/** "null:" throws data away, as in nbdcopy. */
export const NULL_TARGET = "null:";

/** A path, not an NBD URI. @throws CowcatcherError UNSUPPORTED for a URI, USAGE for an empty text. */
export function parseImage(text: string, argument = "IMAGE"): string {
  if (isNbdUri(text)) {
    throw unsupported(text, "NBD URIs are not supported in this version", "give the path of an image");
  }
  if (text === "") throw usageError(argument, "is empty", "give the path of an image");
  return text;
}

const FORMAT_OF_EXTENSION = new Map<string, ImageFormat>([
  ["raw", "raw"],
  ["img", "raw"],
  ["qcow2", "qcow2"],
  ["qcow", "qcow2"],
]);

/** The format that a target's extension says, if it says one. */
export function formatByExtension(path: string): ImageFormat | undefined {
  const extension = /\.([^./]+)$/.exec(path)?.[1]?.toLowerCase();
  return extension === undefined ? undefined : FORMAT_OF_EXTENSION.get(extension);
}
