// A gate between a guest's freeze and T0: somebody else does what has to be done while the file systems hold still (a
// database's snapshot, a note of the log's position), and says when T0 may be.
//
//   freeze ─► frozen ─► connect to the gate's socket ─► a line comes: "go" ─► T0 ─► thaw
//                            └─ another line, no line, no answer, no socket ─► thaw, and there is no backup
//
// Asking is all that is done here. The guest's agent is not the gate's: whatever becomes of whoever keeps the gate, the thaw
// goes its own way. The wait is bounded, as the guest cannot write meanwhile. Main thread.
import { connect } from "node:net";
import type { FreezeInfo, GuestFreezer } from "../backup/job/while-frozen.js";
import { CowcatcherError, ioError, toCowcatcherError } from "../errors.js";
import { GuestFreeze } from "./guest-freeze.js";

/** The longest that a gate may keep a guest frozen. Windows thaws by itself after ten seconds. */
export const T0_GATE_MS = 30_000;
/** What the gate says when T0 may be. */
export const GATE_OPEN = "go";
/** Of its line: a reason for people. */
const MAX_LINE_BYTES = 4096;

/** Who freezes a guest for T0, and who is asked before T0. */
export interface FreezeRequest {
  /** Socket of the guest's agent; of a domain also `libvirt` (libvirt/domain-freeze.ts). */
  agent: string;
  /** Socket of the gate; undefined: T0 follows at once. */
  t0Gate?: string | undefined;
}

/** Who freezes, and what errors call the guest. */
export type NamedFreezer = GuestFreezer & { readonly path: string };

/** @param freezer where it is not the agent at the request's socket */
export function makeFreezer(
  { agent, t0Gate }: FreezeRequest,
  freezer: NamedFreezer = new GuestFreeze(agent),
): NamedFreezer {
  return t0Gate === undefined ? freezer : new GatedFreeze(freezer, t0Gate);
}

/** A freeze that is over only when the gate has opened. */
export class GatedFreeze implements GuestFreezer {
  /** @param limitMs of the wait; another one only in tests */
  constructor(
    private readonly freezer: NamedFreezer,
    private readonly gate: string,
    private readonly limitMs = T0_GATE_MS,
  ) {}

  get path(): string {
    return this.freezer.path;
  }

  get info(): FreezeInfo | undefined {
    return this.freezer.info;
  }

  check(): Promise<void> {
    return this.freezer.check();
  }

  async freeze(signal?: AbortSignal): Promise<void> {
    await this.freezer.freeze(signal);
    await passGate(this.gate, this.limitMs, signal);
  }

  thaw(): Promise<void> {
    return this.freezer.thaw();
  }
}

/** @throws CowcatcherError where it does not open, with the gate's own words */
function passGate(path: string, limitMs: number, signal: AbortSignal | undefined): Promise<void> {
  return new Promise((settle, reject) => {
    const socket = connect(path);
    let line = "";
    const end = (error?: unknown): void => {
      clearTimeout(timer);
      signal?.removeEventListener("abort", onAbort);
      socket.destroy();
      if (error === undefined) settle();
      else reject(toCowcatcherError(error, path));
    };
    const onAbort = (): void => end(signal?.reason);
    const timer = setTimeout(() => end(closed(path, `gave no answer within ${limitMs / 1000} s`)), limitMs);
    signal?.addEventListener("abort", onAbort);
    if (signal?.aborted === true) onAbort();
    socket.setEncoding("utf8");
    socket.on("data", (text: string) => {
      line += text;
      const length = line.indexOf("\n");
      if (length < 0 && line.length < MAX_LINE_BYTES) return;
      const word = line.slice(0, length < 0 ? MAX_LINE_BYTES : length);
      end(word === GATE_OPEN ? undefined : closed(path, `says: ${word}`));
    });
    socket.on("error", (cause) => end(ioError("ask the gate of T0", path, cause)));
    socket.on("close", () => end(closed(path, "hung up without an answer")));
  });
}

function closed(object: string, how: string): CowcatcherError {
  return new CowcatcherError({ code: "IO", object, problem: `the gate of T0 ${how}` });
}
