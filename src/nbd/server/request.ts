// A request's header, compact or extended, and what the server makes of it before the device hears of it.
//
// One RequestHeader is read into again and again; who needs it beyond the turn takes a copy. Cookie and offset are
// kept as 32-bit halves beside the number: both travel back to the client bit by bit, and a BigInt would be an
// allocation a request.
//
// Specification: doc/proto.md, "Request message", "Request types" and "Error values"; extended headers: the branch
// extension-ext-header of the same document.

import type { NbdExport } from "./export.js";
import type { ReplyForm } from "./reply-form.js";
import {
  EXTENDED_REQUEST_HEADER_BYTES,
  MAX_PAYLOAD_BYTES,
  NBD_CMD_BLOCK_STATUS,
  NBD_CMD_CACHE,
  NBD_CMD_DISC,
  NBD_CMD_FLAG_DF,
  NBD_CMD_FLAG_FAST_ZERO,
  NBD_CMD_FLAG_FUA,
  NBD_CMD_FLAG_NO_HOLE,
  NBD_CMD_FLAG_PAYLOAD_LEN,
  NBD_CMD_FLAG_REQ_ONE,
  NBD_CMD_FLUSH,
  NBD_CMD_READ,
  NBD_CMD_TRIM,
  NBD_CMD_WRITE,
  NBD_CMD_WRITE_ZEROES,
  NBD_EINVAL,
  NBD_ENOSPC,
  NBD_ENOTSUP,
  NBD_EOVERFLOW,
  NBD_EPERM,
  NBD_ESHUTDOWN,
  NBD_EXTENDED_REQUEST_MAGIC,
  NBD_REQUEST_MAGIC,
  readUint64,
  REQUEST_HEADER_BYTES,
} from "../wire/protocol.js";

/** A BLOCK_STATUS payload: the range's length, then the ids of the contexts that are asked about. */
export const STATUS_PAYLOAD_HEAD_BYTES = 8;
export const STATUS_PAYLOAD_ID_BYTES = 4;

export class RequestHeader {
  flags = 0;
  command = 0;
  cookieHigh = 0;
  cookieLow = 0;
  offsetHigh = 0;
  offsetLow = 0;
  offsetBytes = 0;
  /** Bytes of the export that the request is about. */
  lengthBytes = 0;
  /** Bytes that follow the header. */
  payloadBytes = 0;

  /** Everything but the magic of the header at `at`. */
  read(view: DataView, at: number, isExtended: boolean): void {
    this.flags = view.getUint16(at + 4);
    this.command = view.getUint16(at + 6);
    this.cookieHigh = view.getUint32(at + 8);
    this.cookieLow = view.getUint32(at + 12);
    this.offsetHigh = view.getUint32(at + 16);
    this.offsetLow = view.getUint32(at + 20);
    this.offsetBytes = readUint64(view, at + 16);
    if (isExtended) {
      this.lengthBytes = readUint64(view, at + 24);
      this.payloadBytes = this.has(NBD_CMD_FLAG_PAYLOAD_LEN) ? this.lengthBytes : 0;
    } else {
      this.lengthBytes = view.getUint32(at + 24);
      this.payloadBytes = this.command === NBD_CMD_WRITE ? this.lengthBytes : 0;
    }
  }

  has(flag: number): boolean {
    return (this.flags & flag) !== 0;
  }

  copy(): RequestHeader {
    return Object.assign(new RequestHeader(), this);
  }
}

/** Flags that each command may carry, by command; DF needs structured replies besides. */
const ALLOWED_FLAGS: readonly number[] = (() => {
  const allowed: number[] = [];
  allowed[NBD_CMD_READ] = NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_DF;
  allowed[NBD_CMD_WRITE] = NBD_CMD_FLAG_FUA;
  allowed[NBD_CMD_DISC] = NBD_CMD_FLAG_FUA;
  allowed[NBD_CMD_FLUSH] = NBD_CMD_FLAG_FUA;
  allowed[NBD_CMD_TRIM] = NBD_CMD_FLAG_FUA;
  allowed[NBD_CMD_CACHE] = NBD_CMD_FLAG_FUA;
  allowed[NBD_CMD_WRITE_ZEROES] = NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO;
  allowed[NBD_CMD_BLOCK_STATUS] = NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_REQ_ONE;
  return allowed;
})();

const ALLOWED_FLAGS_EXTENDED: readonly number[] = (() => {
  const allowed = [...ALLOWED_FLAGS];
  for (const command of [NBD_CMD_WRITE, NBD_CMD_BLOCK_STATUS]) {
    allowed[command] = (allowed[command] ?? 0) | NBD_CMD_FLAG_PAYLOAD_LEN;
  }
  return allowed;
})();

/** What one connection's requests may ask. */
export class RequestRules {
  readonly isExtended: boolean;
  readonly headerBytes: number;
  readonly magic: number;
  /** The server closes: whatever changes or reads the export is refused. */
  isRefusing = false;
  private readonly allowedFlags: readonly number[];
  private readonly sizeBytes: number;
  private readonly isReadOnly: boolean;

  constructor(
    private readonly nbdExport: NbdExport,
    private readonly form: ReplyForm,
    private readonly contextCount: number,
  ) {
    this.isExtended = form === "extended";
    this.headerBytes = this.isExtended ? EXTENDED_REQUEST_HEADER_BYTES : REQUEST_HEADER_BYTES;
    this.magic = this.isExtended ? NBD_EXTENDED_REQUEST_MAGIC : NBD_REQUEST_MAGIC;
    this.allowedFlags = this.isExtended ? ALLOWED_FLAGS_EXTENDED : ALLOWED_FLAGS;
    this.sizeBytes = nbdExport.device.sizeBytes;
    this.isReadOnly = nbdExport.readOnly;
  }

  /** The error that the request deserves before the device is asked; 0 for none. */
  check(request: RequestHeader): number {
    const { flags, command, lengthBytes } = request;
    const allowedFlags = this.allowedFlags[command];
    if (allowedFlags === undefined) return NBD_EINVAL;
    if ((flags & ~allowedFlags) !== 0) return NBD_EINVAL;
    if (command === NBD_CMD_DISC) return 0;
    if (this.isRefusing) return NBD_ESHUTDOWN;
    const isBeyondEnd = this.isBeyondEnd(request);
    switch (command) {
      case NBD_CMD_READ:
        if (request.has(NBD_CMD_FLAG_DF) && this.form === "simple") return NBD_EINVAL;
        if (isBeyondEnd) return NBD_EINVAL;
        return lengthBytes > MAX_PAYLOAD_BYTES ? NBD_EOVERFLOW : 0;
      case NBD_CMD_WRITE:
        if (this.isReadOnly) return NBD_EPERM;
        if (this.isExtended && !request.has(NBD_CMD_FLAG_PAYLOAD_LEN)) return NBD_EINVAL;
        if (lengthBytes > MAX_PAYLOAD_BYTES) return NBD_EINVAL;
        return isBeyondEnd ? NBD_ENOSPC : 0;
      case NBD_CMD_WRITE_ZEROES:
        if (this.isReadOnly) return NBD_EPERM;
        if (isBeyondEnd) return NBD_ENOSPC;
        return request.has(NBD_CMD_FLAG_FAST_ZERO) && !this.isFastZero(request) ? NBD_ENOTSUP : 0;
      case NBD_CMD_TRIM:
        if (this.isReadOnly) return NBD_EPERM;
        return isBeyondEnd ? NBD_EINVAL : 0;
      case NBD_CMD_FLUSH:
        return request.offsetBytes !== 0 || lengthBytes !== 0 ? NBD_EINVAL : 0;
      case NBD_CMD_BLOCK_STATUS:
        return this.checkBlockStatus(request, isBeyondEnd);
      default:
        return isBeyondEnd ? NBD_EINVAL : 0;
    }
  }

  isBeyondEnd({ offsetBytes, lengthBytes }: RequestHeader): boolean {
    return offsetBytes + lengthBytes > this.sizeBytes;
  }

  private isFastZero(request: RequestHeader): boolean {
    if (request.lengthBytes === 0) return true;
    const { device } = this.nbdExport;
    const mayUnmap = !request.has(NBD_CMD_FLAG_NO_HOLE);
    return device.canZeroFast?.(request.offsetBytes, request.lengthBytes, { mayUnmap }) ?? false;
  }

  /** With a payload the range's length is in there, and is checked when it has come. */
  private checkBlockStatus(request: RequestHeader, isBeyondEnd: boolean): number {
    if (this.contextCount === 0) return NBD_EINVAL;
    if (!request.has(NBD_CMD_FLAG_PAYLOAD_LEN)) {
      return request.lengthBytes === 0 || isBeyondEnd ? NBD_EINVAL : 0;
    }
    const idBytes = request.payloadBytes - STATUS_PAYLOAD_HEAD_BYTES;
    const isWhole = idBytes > 0 && idBytes % STATUS_PAYLOAD_ID_BYTES === 0;
    return isWhole && idBytes <= STATUS_PAYLOAD_ID_BYTES * this.contextCount ? 0 : NBD_EINVAL;
  }
}
