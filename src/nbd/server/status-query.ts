// One BLOCK_STATUS request: which contexts it asks about, their runs, the answer.

import type { BlockDevice } from "../../block/device.js";
import { contextRuns, ExtentList, type ExtentBounds, type ExtentRuns } from "./extents.js";
import { MAX_STATUS_EXTENTS, MAX_STATUS_QUERIES } from "./limits.js";
import type { MetaContext } from "./meta-contexts.js";
import { NBD_CMD_FLAG_PAYLOAD_LEN, NBD_CMD_FLAG_REQ_ONE, NBD_EINVAL, readUint64 } from "../wire/protocol.js";
import type { ReplyWriter } from "./reply-format.js";
import { STATUS_PAYLOAD_HEAD_BYTES, STATUS_PAYLOAD_ID_BYTES, type RequestHeader } from "./request.js";

export class StatusQuery {
  readonly request: RequestHeader;
  private contexts: readonly MetaContext[];
  private runs: ExtentRuns[] = [];

  constructor(
    private readonly device: BlockDevice,
    contexts: readonly MetaContext[],
    request: RequestHeader,
  ) {
    this.request = request.copy();
    this.contexts = contexts;
  }

  /**
   * Takes the range's length and the contexts' ids from the payload, where there is one; its length is checked.
   * @returns EINVAL for a range that `isInside` refuses, an empty one, and for unknown or repeated ids; else 0.
   */
  readPayload(view: DataView, at: number, isInside: (request: RequestHeader) => boolean): number {
    const { request } = this;
    if (!request.has(NBD_CMD_FLAG_PAYLOAD_LEN)) return 0;
    request.lengthBytes = readUint64(view, at);
    if (request.lengthBytes === 0 || !isInside(request)) return NBD_EINVAL;
    const ids = new Set<number>();
    const end = at + request.payloadBytes;
    for (let idAt = at + STATUS_PAYLOAD_HEAD_BYTES; idAt < end; idAt += STATUS_PAYLOAD_ID_BYTES) {
      const id = view.getUint32(idAt);
      if (ids.has(id) || !this.contexts.some((context) => context.id === id)) return NBD_EINVAL;
      ids.add(id);
    }
    this.contexts = this.contexts.filter(({ id }) => ids.has(id));
    return 0;
  }

  /** Asks for all runs; a promise where the device cannot tell at once. @throws what the device throws. */
  gather(): Promise<void> | undefined {
    const { offsetBytes, lengthBytes } = this.request;
    const bounds: ExtentBounds = {
      maxExtents: this.request.has(NBD_CMD_FLAG_REQ_ONE) ? 1 : MAX_STATUS_EXTENTS,
      maxQueries: MAX_STATUS_QUERIES,
    };
    let pending: Promise<void> | undefined;
    this.runs = this.contexts.map(({ source }) => {
      if (source !== undefined) return contextRuns(source, offsetBytes, lengthBytes, bounds);
      const extents = new ExtentList(this.device, offsetBytes, lengthBytes, bounds);
      const rest = extents.gather();
      if (rest !== undefined) {
        pending = extents.gatherRest(rest);
        // The caller awaits it, unless a later context throws first.
        pending.catch(() => undefined);
      }
      return extents;
    });
    return pending;
  }

  answer(writer: ReplyWriter): void {
    const ids = this.contexts.map(({ id }) => id);
    writer.blockStatus(this.request, ids, this.runs);
  }
}
