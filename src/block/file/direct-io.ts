// Single reads, writes and syncs of a file that is open with O_DIRECT: by io_uring on the main thread where the system
// has it, else by libuv's pool, whose four threads are all disks' together. In other threads by blocking them.
//
// Which of the two is decided once, at the first request, for all files: the process has one ring, which its files share
// and the last one closes. It is said in the log (`describeDirectIo`). COWCATCHER_NO_IO_URING=1 decides for the pool.

import { constants } from "node:os";
import { isMainThread } from "node:worker_threads";
import { errnoName } from "../../errno.js";
import { RING_FSYNC, RING_READ, RING_WRITE } from "../../native/io-uring.js";
import { errnoError, syncFileData, transfer, writeFully, type Transfer } from "./fileio.js";
import { RingQueue, type RingRequest } from "./ring-queue.js";

/** The kernel asks for another try: it gets one by the pool. */
const AGAIN = new Set([-constants.errno.EINTR, -constants.errno.EAGAIN]);

let shared: RingQueue | null = null;
let userCount = 0;
/** Why there is no ring; undefined: there is, or nobody has asked. */
let refusal: string | undefined;

/** Null: the pool it is. Else the caller leaves it again. */
function useQueue(): RingQueue | null {
  if (shared === null && refusal === undefined) {
    if (!isMainThread) return null;
    if (process.env["COWCATCHER_NO_IO_URING"] === "1") refusal = "COWCATCHER_NO_IO_URING is set";
    else {
      const opened = RingQueue.open();
      if (typeof opened === "number") refusal = errnoName(opened);
      else shared = opened;
    }
  }
  if (shared !== null) userCount++;
  return shared;
}

async function leaveQueue(): Promise<void> {
  if (--userCount > 0) return;
  const last = shared;
  shared = null;
  await last?.close();
}

/** For the log. */
export async function describeDirectIo(): Promise<{ method: "io_uring" | "threads"; reason?: string }> {
  const queue = useQueue();
  if (queue === null) return { method: "threads", ...(refusal !== undefined && { reason: refusal }) };
  await leaveQueue();
  return { method: "io_uring" };
}

export type RequestQueue = Pick<RingQueue, "start">;

/** One file's requests; their offsets, lengths and addresses are as O_DIRECT wants them. */
export class DirectIo {
  private isUsing = false;

  /** @param queue undefined: the process's, null: the pool. (Others in tests.) */
  constructor(
    private readonly name: string,
    private readonly fd: number,
    private queue?: RequestQueue | null,
  ) {}

  /** One read, which may be short: bytes. @throws CowcatherError IO with the offset */
  readOnce(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<number> {
    return this.transfer("read", this.name, this.fd, buffer, bufferOffset, lengthBytes, offsetBytes);
  }

  /** The whole range. @throws CowcatherError IO or NO_SPACE with the offset */
  writeFully(
    buffer: Uint8Array,
    bufferOffset: number,
    lengthBytes: number,
    offsetBytes: number,
  ): Promise<void> {
    return writeFully(this.name, this.fd, buffer, bufferOffset, lengthBytes, offsetBytes, this.transfer);
  }

  /** fdatasync. @throws what the system gave: by the pool without the file's name, which callers add */
  async syncData(): Promise<void> {
    const { fd } = this;
    const queue = this.use();
    if (queue === null) return syncFileData(fd);
    const result = await new Promise<number | null>((settle) => {
      queue.start({ operation: RING_FSYNC, ...NO_MEMORY, fd, settle });
    });
    if (result === null || AGAIN.has(result)) return syncFileData(fd);
    if (result < 0) throw errnoError("flush", this.name, result);
  }

  /** Nothing may be in flight. */
  async close(): Promise<void> {
    if (this.isUsing) await leaveQueue();
    this.isUsing = false;
    this.queue = null;
  }

  private use(): RequestQueue | null {
    if (this.queue === undefined) {
      this.queue = useQueue();
      this.isUsing = this.queue !== null;
    }
    return this.queue;
  }

  private readonly transfer: Transfer = (
    action,
    name,
    fd,
    buffer,
    bufferOffset,
    lengthBytes,
    offsetBytes,
  ) => {
    const queue = this.use();
    if (queue === null) return transfer(action, name, fd, buffer, bufferOffset, lengthBytes, offsetBytes);
    return new Promise((resolve, reject) => {
      const request: RingRequest = {
        operation: action === "read" ? RING_READ : RING_WRITE,
        fd,
        buffer,
        bufferOffset,
        lengthBytes,
        offsetBytes,
        settle: (result) => {
          if (result === null || AGAIN.has(result)) {
            // Nothing of it is done.
            resolve(transfer(action, name, fd, buffer, bufferOffset, lengthBytes, offsetBytes));
          } else if (result < 0) reject(errnoError(action, name, result, offsetBytes));
          else resolve(result);
        },
      };
      queue.start(request);
    });
  };
}

const NO_MEMORY = { buffer: null, bufferOffset: 0, lengthBytes: 0, offsetBytes: 0 };
