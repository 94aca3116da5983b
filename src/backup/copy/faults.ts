// Faults on purpose: a stage between the copy and its source and target that fails, delays or ends the worker, so
// that anybody can see what a backup does when things go wrong (nbdkit's error and delay filters are the model).
// Asked for by the environment variable COWCATCHER_FAULTS of the process whose workers copy: `serve` for a live
// backup, `backup` for an offline one. Without it no stage stands in the way.
//
//   COWCATCHER_FAULTS = fault ; fault …      fault = STAGE:ACTION,option,option …
//
//   STAGE     target-write   each write to the target, zeroes included
//             target-read    each read of the target by --verify
//             source-read    each read of the source, questions for holes included
//             worker         each chunk that a worker takes, before it is read: the worker holds its claim then
//   ACTION    error=EIO      the operation fails with this errno (not with worker)
//             delay=20ms     the operation waits first; an aborted backup ends the wait
//             hang=1m        the same, but nothing ends the wait: a server that does not answer
//             corrupt        one bit of what is written is flipped, at `from` or at the write's first byte
//                            (only with target-write; zeroes pass unharmed)
//             cut=1M         the source's file, or the one that `file` names, is cut to this size first (only with
//                            source-read): as when another program truncates an image in use
//             exit           the thread ends
//             throw          a plain TypeError, as a bug would throw it
//   options   from=1M        only operations that touch [from, to) of the disk
//             to=2M
//             after=3        lets the first three that match pass
//             count=2        then strikes twice (without it: every time)
//             worker=0       only in this worker; each worker counts for itself
//             file=PATH      what is cut, such as a backing file; neither commas nor semicolons in it
//
//   COWCATCHER_FAULTS='target-write:error=EIO,from=1M,count=2;target-write:delay=20ms;worker:exit,after=3'

import { truncateSync } from "node:fs";
import { CTL_RUN, RUN_ABORTING } from "../../cow/shared.js";
import { isErrnoName } from "../../errno.js";
import { CowcatcherError, ioError } from "../../errors.js";
import type { Completion, SourceReader } from "../../block/device.js";
import type { TargetWriter } from "../../cow/target-writer.js";
import { parseDurationMs, parseSize } from "../../units.js";

export const FAULTS_VARIABLE = "COWCATCHER_FAULTS";

const STAGES = ["target-write", "target-read", "source-read", "worker"] as const;
export type FaultStage = (typeof STAGES)[number];

const ACTIONS = ["error", "delay", "hang", "corrupt", "cut", "exit", "throw"] as const;
/** No byte of the operation is to be corrupted. */
const INTACT = -1;

export interface Fault {
  stage: FaultStage;
  action: (typeof ACTIONS)[number];
  /** Of `error`: the system's name, such as "EIO". */
  errno: string;
  /** Of `delay` and `hang`. */
  delayMs: number;
  /** Of `cut`. */
  cutBytes: number;
  /** Undefined: the source. */
  cutFile: string | undefined;
  fromBytes: number;
  /** Exclusive. */
  toBytes: number;
  /** Operations that pass before the first that is struck. */
  after: number;
  count: number;
  /** Undefined: every worker. */
  workerIndex: number | undefined;
}

/** @throws CowcatcherError USAGE, naming the variable and the word that is wrong. */
export function parseFaults(text: string): Fault[] {
  return text
    .split(";")
    .map((part) => part.trim())
    .filter((part) => part !== "")
    .map(parseFault);
}

function parseFault(text: string): Fault {
  const [head = "", ...options] = text.split(",").map((word) => word.trim());
  const [stageText = "", actionText = ""] = splitOnce(head, ":");
  const [action, value] = splitOnce(actionText, "=");
  const fault: Fault = {
    stage: oneOf(stageText, STAGES, "is no stage"),
    action: oneOf(action, ACTIONS, "is no action"),
    errno: "EIO",
    delayMs: 0,
    cutBytes: 0,
    cutFile: undefined,
    fromBytes: 0,
    toBytes: Infinity,
    after: 0,
    count: Infinity,
    workerIndex: undefined,
  };
  readActionValue(fault, value);
  for (const option of options) readOption(fault, option);
  return fault;
}

function readActionValue(fault: Fault, value: string | undefined): void {
  switch (fault.action) {
    case "error":
      if (fault.stage === "worker") throw bad("worker:error", "makes no sense", "give exit, throw or delay");
      fault.errno = value ?? "EIO";
      if (!isErrnoName(fault.errno)) throw bad(fault.errno, "is no errno", "give a name such as EIO");
      return;
    case "delay":
    case "hang":
      if (value === undefined) throw bad(fault.action, "needs a duration", `give ${fault.action}=20ms`);
      fault.delayMs = parseDurationMs(value, FAULTS_VARIABLE);
      return;
    case "corrupt":
      if (fault.stage !== "target-write") {
        throw bad(`${fault.stage}:corrupt`, "makes no sense", "give target-write:corrupt");
      }
      if (value !== undefined) throw bad(`corrupt=${value}`, "takes no value");
      return;
    case "cut":
      if (fault.stage !== "source-read")
        throw bad(`${fault.stage}:cut`, "makes no sense", "give source-read:cut");
      if (value === undefined) throw bad("cut", "needs a size", "give cut=1M");
      fault.cutBytes = parseSize(value, FAULTS_VARIABLE);
      return;
    case "exit":
    case "throw":
      if (value !== undefined) throw bad(`${fault.action}=${value}`, "takes no value");
  }
}

function readOption(fault: Fault, option: string): void {
  const [key, value = ""] = splitOnce(option, "=");
  switch (key) {
    case "from":
      fault.fromBytes = parseSize(value, FAULTS_VARIABLE);
      return;
    case "to":
      fault.toBytes = parseSize(value, FAULTS_VARIABLE);
      return;
    case "after":
      fault.after = parseNumber(option, value);
      return;
    case "count":
      fault.count = parseNumber(option, value);
      return;
    case "worker":
      fault.workerIndex = parseNumber(option, value);
      return;
    case "file":
      fault.cutFile = value;
      return;
    default:
      throw bad(option, "is no option", "give from, to, after, count, worker or file");
  }
}

function parseNumber(option: string, value: string): number {
  if (!/^\d{1,15}$/.test(value)) throw bad(option, "needs a number");
  return Number(value);
}

function oneOf<T extends string>(text: string, choices: readonly T[], problem: string): T {
  const found = choices.find((choice) => choice === text);
  if (found === undefined) throw bad(text, problem, `give ${choices.join(", ")}`);
  return found;
}

function splitOnce(text: string, separator: string): [string, string | undefined] {
  const at = text.indexOf(separator);
  return at < 0 ? [text, undefined] : [text.slice(0, at), text.slice(at + 1)];
}

function bad(word: string, problem: string, hint?: string): CowcatcherError {
  return new CowcatcherError({
    code: "USAGE",
    object: FAULTS_VARIABLE,
    problem: `'${word}' ${problem}`,
    hint,
  });
}

/** One worker's faults, with how often each has matched so far. */
class Strikes {
  readonly #matched: number[];

  constructor(
    readonly faults: readonly Fault[],
    readonly control: Int32Array,
  ) {
    this.#matched = faults.map(() => 0);
  }

  /**
   * Strikes with whatever is due for an operation of `stage` on [offsetBytes, +lengthBytes).
   * @returns the offset of the byte that is to be corrupted, or INTACT.
   */
  strike(stage: FaultStage, verb: string, object: string, offsetBytes: number, lengthBytes: number): number {
    let corruptOffset = INTACT;
    this.faults.forEach((fault, index) => {
      if (fault.stage !== stage) return;
      if (offsetBytes + lengthBytes <= fault.fromBytes || offsetBytes >= fault.toBytes) return;
      const earlier = this.#matched[index] ?? 0;
      this.#matched[index] = earlier + 1;
      if (earlier < fault.after || earlier >= fault.after + fault.count) return;
      const at = Math.max(offsetBytes, fault.fromBytes);
      if (fault.action === "corrupt") corruptOffset = at;
      this.#act(fault, verb, object, at);
    });
    return corruptOffset;
  }

  #act(fault: Fault, verb: string, object: string, offsetBytes: number): void {
    switch (fault.action) {
      case "error":
        throw ioError(
          verb,
          object,
          Object.assign(new Error(fault.errno), { code: fault.errno }),
          offsetBytes,
        );
      case "delay":
        this.#delay(fault.delayMs);
        return;
      case "hang":
        Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, fault.delayMs);
        return;
      case "corrupt":
        // The writer's business: it has the data.
        return;
      case "cut":
        truncateSync(fault.cutFile ?? object, fault.cutBytes);
        return;
      case "exit":
        // In a worker thread this ends the thread, not the process.
        process.exit(1);
        return;
      case "throw":
        throw new TypeError(`a fault asked for by ${FAULTS_VARIABLE}`);
    }
  }

  /** Sleeps on the run state, which every change of it notifies. */
  #delay(delayMs: number): void {
    const endMs = performance.now() + delayMs;
    for (;;) {
      const state = Atomics.load(this.control, CTL_RUN);
      const leftMs = endMs - performance.now();
      if (state === RUN_ABORTING || leftMs <= 0) return;
      Atomics.wait(this.control, CTL_RUN, state, leftMs);
    }
  }
}

class FaultyReader implements SourceReader {
  #chunk = -1;

  constructor(
    readonly inner: SourceReader,
    readonly strikes: Strikes,
    readonly name: string,
    readonly chunkBytes: number,
  ) {}

  get sizeBytes(): number {
    return this.inner.sizeBytes;
  }

  read(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    this.strikes.strike("source-read", "read", this.name, offsetBytes, lengthBytes);
    return this.inner.read(buffer, bufferOffset, lengthBytes, offsetBytes);
  }

  extent(offsetBytes: number, lengthBytes: number): { lengthBytes: number; zero: boolean } {
    this.#noteChunk(offsetBytes, lengthBytes);
    this.strikes.strike("source-read", "read", this.name, offsetBytes, lengthBytes);
    return this.inner.extent(offsetBytes, lengthBytes);
  }

  allocation(offsetBytes: number, lengthBytes: number): { lengthBytes: number; allocated: boolean } {
    this.strikes.strike("source-read", "read", this.name, offsetBytes, lengthBytes);
    return this.inner.allocation?.(offsetBytes, lengthBytes) ?? { lengthBytes, allocated: true };
  }

  release(offsetBytes: number, lengthBytes: number): Completion {
    return this.inner.release?.(offsetBytes, lengthBytes);
  }

  close(): void {
    this.inner.close();
  }

  /** A worker asks for a chunk's extents before it reads; what is longer than a chunk is a region's question. */
  #noteChunk(offsetBytes: number, lengthBytes: number): void {
    const chunk = Math.floor(offsetBytes / this.chunkBytes);
    if (lengthBytes > this.chunkBytes || chunk === this.#chunk) return;
    this.#chunk = chunk;
    this.strikes.strike("worker", "go on", this.name, chunk * this.chunkBytes, this.chunkBytes);
  }
}

class FaultyWriter implements TargetWriter {
  constructor(
    readonly inner: TargetWriter,
    readonly strikes: Strikes,
    readonly name: string,
  ) {}

  write(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    const corruptOffset = this.strikes.strike("target-write", "write", this.name, offsetBytes, lengthBytes);
    if (corruptOffset === INTACT) return this.inner.write(buffer, bufferOffset, lengthBytes, offsetBytes);
    const corrupted = buffer.slice(bufferOffset, bufferOffset + lengthBytes);
    corrupted[corruptOffset - offsetBytes] ^= 1;
    return this.inner.write(corrupted, 0, lengthBytes, offsetBytes);
  }

  writeZeroes(offsetBytes: number, lengthBytes: number): Completion {
    this.strikes.strike("target-write", "write", this.name, offsetBytes, lengthBytes);
    return this.inner.writeZeroes(offsetBytes, lengthBytes);
  }

  settle(): Completion {
    return this.inner.settle?.();
  }

  giveUp(): void {
    this.inner.giveUp?.();
  }

  async finish(): Promise<void> {
    await this.inner.finish?.();
  }

  close(): void {
    this.inner.close();
  }
}

/** What --verify reads the target through. */
class FaultyTargetReader implements SourceReader {
  constructor(
    readonly inner: SourceReader,
    readonly strikes: Strikes,
    readonly name: string,
  ) {}

  get sizeBytes(): number {
    return this.inner.sizeBytes;
  }

  read(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    this.strikes.strike("target-read", "read", this.name, offsetBytes, lengthBytes);
    return this.inner.read(buffer, bufferOffset, lengthBytes, offsetBytes);
  }

  extent(offsetBytes: number, lengthBytes: number): { lengthBytes: number; zero: boolean } {
    return this.inner.extent(offsetBytes, lengthBytes);
  }

  close(): void {
    this.inner.close();
  }
}

export interface FaultPlace {
  /** The job's control words: a delay ends with the job. */
  control: Int32Array;
  workerIndex: number;
  chunkBytes: number;
  sourceName: string;
  targetName: string;
}

/** One worker's doors to source and target, with the faults of `text` before them. @throws as parseFaults. */
export function withFaults(
  text: string | undefined,
  reader: SourceReader,
  writer: TargetWriter,
  { control, workerIndex, chunkBytes, sourceName, targetName }: FaultPlace,
): { reader: SourceReader; writer: TargetWriter } {
  if (text === undefined || text === "") return { reader, writer };
  const strikes = strikesOf(text, control, workerIndex);
  return {
    reader: new FaultyReader(reader, strikes, sourceName, chunkBytes),
    writer: new FaultyWriter(writer, strikes, targetName),
  };
}

/** One worker's door to the target as --verify reads it back, with its faults before it. @throws as parseFaults. */
export function withTargetReadFaults(
  text: string | undefined,
  reader: SourceReader,
  { control, workerIndex, targetName }: Pick<FaultPlace, "control" | "workerIndex" | "targetName">,
): SourceReader {
  if (text === undefined || text === "") return reader;
  return new FaultyTargetReader(reader, strikesOf(text, control, workerIndex), targetName);
}

function strikesOf(text: string, control: Int32Array, workerIndex: number): Strikes {
  const mine = parseFaults(text).filter((fault) => (fault.workerIndex ?? workerIndex) === workerIndex);
  return new Strikes(mine, control);
}
