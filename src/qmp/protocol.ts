// What both ends of a QMP connection agree on: error classes, limits, and the `x-cowcatcher` object that carries what
// an error's class and text do not tell. Written and read here and nowhere else.

import { CowcatcherError } from "../errors.js";
import type { ErrorCode, ErrorDetails } from "../errors.js";

/** QEMU's QapiErrorClass, as far as it is used here. */
export const QMP_ERROR_CLASSES = [
  "GenericError",
  "CommandNotFound",
  "DeviceNotActive",
  "DeviceNotFound",
] as const;
export type QmpErrorClass = (typeof QMP_ERROR_CLASSES)[number];

/** The version of QEMU whose dialect is spoken; clients decide by it what they may ask for. */
export const DIALECT_VERSION = { major: 7, minor: 2, micro: 0 };

/** A transaction over hundreds of disks is some 100 KiB; nesting goes five deep. */
export const REQUEST_LIMITS = { maxBytes: 1024 * 1024, maxDepth: 64 };
/** Answers list every job, so they may be longer. */
export const ANSWER_LIMITS = { maxBytes: 16 * 1024 * 1024, maxDepth: 64 };

export type JsonObject = Record<string, unknown>;

/** Whether a value is a JSON object: no array, not null. */
export function isJsonObject(value: unknown): value is JsonObject {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

const CODE_OF_CLASS: Record<QmpErrorClass, ErrorCode> = {
  GenericError: "PROTOCOL",
  CommandNotFound: "UNSUPPORTED",
  DeviceNotActive: "NOT_FOUND",
  DeviceNotFound: "NOT_FOUND",
};

/** A command's error answer: thrown by the server's handlers, and by the client when it receives one. */
export class QmpError extends CowcatcherError {
  readonly errorClass: QmpErrorClass;
  readonly desc: string;

  /** @param details what the engine said, where the error is more than the answer's text. */
  constructor(errorClass: QmpErrorClass, desc: string, details?: Partial<ErrorDetails>) {
    super({ code: CODE_OF_CLASS[errorClass], object: "control socket", problem: desc, ...details });
    this.name = "QmpError";
    this.errorClass = errorClass;
    this.desc = desc;
  }
}

/** An error of QEMU's class GenericError. */
export function genericError(desc: string): QmpError {
  return new QmpError("GenericError", desc);
}

/** The error for what QEMU has and this version has not, by name; code UNSUPPORTED. */
export function notSupported(what: string): QmpError {
  return new QmpError("GenericError", `${what} is not supported by this version`, { code: "UNSUPPORTED" });
}

/** The `error` member of an answer. What the class does not tell goes along; QEMU's own errors look as QEMU's do. */
export function errorAnswer(error: CowcatcherError): JsonObject {
  if (error instanceof QmpError) {
    const answer = { class: error.errorClass, desc: error.desc };
    return error.code === CODE_OF_CLASS[error.errorClass]
      ? answer
      : { ...answer, "x-cowcatcher": errorToWire(error) };
  }
  return { class: "GenericError", desc: error.message, "x-cowcatcher": errorToWire(error) };
}

/** The inverse; `object` is what an error without details is about (the socket's path). */
export function errorFromAnswer(answer: unknown, object: string): QmpError {
  const { class: errorClass, desc, "x-cowcatcher": details } = isJsonObject(answer) ? answer : {};
  const known = QMP_ERROR_CLASSES.find((name) => name === errorClass) ?? "GenericError";
  const text = typeof desc === "string" ? desc : "the answer is an error without a description";
  return new QmpError(known, text, detailsFromWire(details) ?? { object });
}

/** An error as the `x-cowcatcher` object that `errorFromWire` reads. */
export function errorToWire(error: CowcatcherError): JsonObject {
  const { code, object, problem, hint, offsetBytes, errno } = error;
  return { code, object, problem, hint, offset: offsetBytes, errno };
}

/** Undefined when `value` is no error's details. */
export function errorFromWire(value: unknown): CowcatcherError | undefined {
  const details = detailsFromWire(value);
  return details === undefined ? undefined : new CowcatcherError(details);
}

function detailsFromWire(value: unknown): ErrorDetails | undefined {
  if (!isJsonObject(value)) return undefined;
  const { code, object, problem, hint, offset, errno } = value;
  if (typeof object !== "string" || typeof problem !== "string") return undefined;
  return {
    code: isErrorCode(code) ? code : "PROTOCOL",
    object,
    problem,
    hint: typeof hint === "string" ? hint : undefined,
    offsetBytes: typeof offset === "number" ? offset : undefined,
    errno: typeof errno === "string" ? errno : undefined,
  };
}

// A record, so that the compiler complains when a code is missing.
const ERROR_CODES: Record<ErrorCode, true> = {
  USAGE: true,
  IO: true,
  NO_SPACE: true,
  FORMAT: true,
  UNSUPPORTED: true,
  LOCKED: true,
  EXISTS: true,
  NOT_FOUND: true,
  PROTOCOL: true,
  BUSY: true,
  BUFFER_FULL: true,
  GUEST_TIMEOUT: true,
  SNAPSHOT: true,
  CANCELLED: true,
  SERVER_ENDED: true,
  WORKER: true,
  VERIFY: true,
  NO_BASIS: true,
  KEY: true,
  LIMIT: true,
  INTERNAL: true,
};

function isErrorCode(value: unknown): value is ErrorCode {
  return typeof value === "string" && Object.hasOwn(ERROR_CODES, value);
}
