// What a server offers under a name.

import type { BlockDevice } from "../../block/device.js";
import { MiB } from "../../units.js";
import type { ReplyForm } from "./reply-form.js";
import {
  MAX_PAYLOAD_BYTES,
  NBD_FLAG_BLOCK_STATUS_PAYLOAD,
  NBD_FLAG_CAN_MULTI_CONN,
  NBD_FLAG_HAS_FLAGS,
  NBD_FLAG_READ_ONLY,
  NBD_FLAG_SEND_CACHE,
  NBD_FLAG_SEND_DF,
  NBD_FLAG_SEND_FAST_ZERO,
  NBD_FLAG_SEND_FLUSH,
  NBD_FLAG_SEND_FUA,
  NBD_FLAG_SEND_TRIM,
  NBD_FLAG_SEND_WRITE_ZEROES,
} from "../wire/protocol.js";

/** A metadata context that an export offers besides base:allocation. */
export interface StatusContext {
  /** As on the wire: namespace, colon, leaf name. */
  readonly name: string;
  /** The run from offsetBytes on, at most lengthBytes; flags as the context defines them, 32 bits. */
  status(offsetBytes: number, lengthBytes: number): { lengthBytes: number; flags: number };
}

export interface NbdExport {
  /** At most 4096 bytes of UTF-8. */
  name: string;
  /** For people; may be empty. */
  description: string;
  /** Owned by the caller, who closes it after the server is closed. Its size must not change. */
  device: BlockDevice;
  readOnly: boolean;
  /** `device.flush` covers every connection's completed writes, so clients may open several. */
  canMultiConn: boolean;
  /** Comes and goes while the server runs, so it is never the one that the empty name means. */
  isTemporary?: boolean;
  /** Their names differ. */
  contexts?: readonly StatusContext[];
}

/** What pino offers, and all that this folder uses of it. */
export interface NbdLogger {
  debug(fields: object, message: string): void;
  info(fields: object, message: string): void;
  warn(fields: object, message: string): void;
  error(fields: object, message: string): void;
}

/** @param hasContexts the client has chosen metadata contexts of this export */
export function transmissionFlags(nbdExport: NbdExport, form: ReplyForm, hasContexts: boolean): number {
  let flags = NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_CACHE;
  if (nbdExport.readOnly) flags |= NBD_FLAG_READ_ONLY;
  else flags |= NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO;
  if (nbdExport.canMultiConn) flags |= NBD_FLAG_CAN_MULTI_CONN;
  if (form !== "simple") flags |= NBD_FLAG_SEND_DF;
  if (form === "extended" && hasContexts) flags |= NBD_FLAG_BLOCK_STATUS_PAYLOAD;
  return flags;
}

/** The size constraints to advertise, in bytes. Any alignment is served; a cluster is what costs least. */
export function blockSizes(nbdExport: NbdExport): { minimum: number; preferred: number; maximum: number } {
  const preferred = Math.min(Math.max(4096, nbdExport.device.clusterSizeBytes), 2 * MiB);
  return { minimum: 1, preferred, maximum: MAX_PAYLOAD_BYTES };
}
