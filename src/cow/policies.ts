// What copy-before-write does when something is in the way: the buffer is full, a capture fails, source or target
// cannot be read or written. QEMU's terms. The engine's own: a job's options are made of them.

export const ON_BUFFER_FULL = ["spill", "wait", "cancel"] as const;
export type OnBufferFull = (typeof ON_BUFFER_FULL)[number];
export const ON_CBW_ERROR = ["break-snapshot", "break-guest-write"] as const;
export type OnCbwError = (typeof ON_CBW_ERROR)[number];
export const ON_IO_ERROR = ["report", "ignore", "stop"] as const;
/** `enospc`, which only the control socket has: stop where there is no space left, else report. */
export type OnIoError = (typeof ON_IO_ERROR)[number] | "enospc";

/** How guest writes are treated while their old data is kept. */
export interface InterceptPolicy {
  onBufferFull: OnBufferFull;
  onCbwError: OnCbwError;
  /** Longest wait of one guest write, in milliseconds. */
  guestTimeoutMs: number;
}
