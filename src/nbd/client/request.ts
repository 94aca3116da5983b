// A request of the client from its making to its end, and the errors that one can end with.

import { CowcatcherError, ioError } from "../../errors.js";
import {
  NBD_CMD_BLOCK_STATUS,
  NBD_CMD_FLUSH,
  NBD_CMD_READ,
  NBD_CMD_TRIM,
  NBD_CMD_WRITE,
  NBD_CMD_WRITE_ZEROES,
  NBD_EINVAL,
  NBD_EIO,
  NBD_ENOMEM,
  NBD_ENOSPC,
  NBD_ENOTSUP,
  NBD_EOVERFLOW,
  NBD_EPERM,
  NBD_ESHUTDOWN,
} from "../wire/protocol.js";

const ERRNO_OF_NBD: ReadonlyMap<number, string> = new Map([
  [NBD_EPERM, "EPERM"],
  [NBD_EIO, "EIO"],
  [NBD_ENOMEM, "ENOMEM"],
  [NBD_EINVAL, "EINVAL"],
  [NBD_ENOSPC, "ENOSPC"],
  [NBD_EOVERFLOW, "EOVERFLOW"],
  [NBD_ENOTSUP, "ENOTSUP"],
  [NBD_ESHUTDOWN, "ESHUTDOWN"],
]);

const COMMAND_NAMES: Readonly<Record<number, string>> = {
  [NBD_CMD_READ]: "read",
  [NBD_CMD_WRITE]: "write",
  [NBD_CMD_FLUSH]: "flush",
  [NBD_CMD_TRIM]: "trim",
  [NBD_CMD_WRITE_ZEROES]: "write zeroes",
  [NBD_CMD_BLOCK_STATUS]: "ask for the block status",
};

export function commandName(command: number): string {
  return COMMAND_NAMES[command] ?? "finish a request";
}

/** Extents of one metadata context, in order from the request's offset on. */
export interface Extents {
  lengths: number[];
  flags: number[];
}

export interface Request {
  readonly command: number;
  readonly flags: number;
  readonly offsetBytes: number;
  readonly lengthBytes: number;
  /** A read's destination or a write's source: exactly lengthBytes. */
  readonly data: Uint8Array | undefined;
  readonly resolve: () => void;
  readonly reject: (error: CowcatcherError) => void;
  /** Of a structured read: what has arrived, sorted, [from, to) pairs in the request. */
  covered?: number[];
  /** Of a block status: the extents of each metadata context. */
  extents?: Map<string, Extents>;
  /** What the server says went wrong, from an error chunk before the last one. */
  nbdError?: number;
  nbdErrorOffset?: number | undefined;
  nbdErrorText?: string;
  /** When it was sent, as performance.now() has it. */
  sentMs: number;
}

/** The server's own error as one of ours. A value that the protocol does not list means EINVAL there. */
export function replyError(object: string, request: Request, nbdError: number): CowcatcherError {
  const errno = ERRNO_OF_NBD.get(nbdError) ?? "EINVAL";
  const offset =
    request.command === NBD_CMD_FLUSH ? undefined : (request.nbdErrorOffset ?? request.offsetBytes);
  const error = ioError(commandName(request.command), object, { code: errno }, offset);
  const said = request.nbdErrorText;
  if (said === undefined || said === "") return error;
  return new CowcatcherError({ ...error.toDetails(), problem: `${error.problem}: ${said}` });
}

export function connectionError(object: string, problem: string, errno: string): CowcatcherError {
  return new CowcatcherError({ code: "IO", object, problem, errno });
}
