// A worker of a backup: one endless task, and in a server one after another (copy-threads.ts). It opens its doors to
// source and target, says that it is ready, and from T0 on takes chunks until none is
// left. On the data path it meets the main thread only in shared memory; its port carries what happens once: ready,
// begin, stopped for an error.

import { once } from "node:events";
import { setTimeout as delay } from "node:timers/promises";
import type { MessagePort } from "node:worker_threads";
import type { CopyResult, CopyTask, WorkerCommand, WorkerMessage } from "../src/backup/copy/task.js";
import { FAULTS_VARIABLE, withFaults } from "../src/backup/copy/faults.js";
import { driveTogether } from "../src/backup/copy/drive-async.js";
import { bootIsOver } from "../src/backup/copy/thread-boots.js";
import { Drainer } from "../src/cow/drain.js";
import type { DrainStep } from "../src/cow/drain-io.js";
import { keptPages } from "../src/cow/page-memory.js";
import {
  CTL_RUN,
  CTL_TAKERS,
  RUN_ABORTING,
  RUN_PAUSED,
  RUN_RUNNING,
  SharedState,
} from "../src/cow/shared.js";
import { SpillFile } from "../src/cow/spill.js";
import { toCowcatcherError } from "../src/errors.js";
import type { SourceDescription, SourceReader } from "../src/block/device.js";
import { libc } from "../src/native/libc.js";
import { isForBlocking } from "../src/nbd/client/blocking-reader.js";
import { parseNbdUri } from "../src/nbd/wire/uri.js";
import type { TargetWriter } from "../src/cow/target-writer.js";
import { openAnySource } from "../src/repository/source.js";
import type { TargetDescription } from "../src/target/target.js";
import { openTarget } from "../src/target/writer.js";

/** Waiters look again after this time, so that a thread that died cannot hold the others. */
const RECHECK_MS = 250;
/** The same for a thread in which others are to go on: how long it blocks, and how long until it looks again. */
const SHORT_WAIT_MS = 1;
const LANE_RECHECK_MS = 5;
const LANE_SLEEP_MS = 50;
/** Chunks on their way between two computers: at 1 MiB each, 16 fill 1 Gbit/s over 100 ms. */
const LANES_OF_ALL_WORKERS = 16;
/** The same for an object store, of chunks of 4 MiB: 32 requests at a time. */
const LANES_TO_STORE = 32;
const MAX_LANES = 8;

bootIsOver();

export default async function copy(task: CopyTask): Promise<CopyResult> {
  const { port } = task;
  try {
    // From here on: a thread that loses its processor while it boots may hold the lock of the process's memory map.
    if (task.niceness > 0) libc?.setThreadNice(task.niceness);
    const shared = new SharedState(task.shared);
    const chunkBuffer = keptPages(0, shared.geometry.chunkBytes, task.target.name);
    chunkBuffer.fill(0);
    send(port, { kind: "ready" });
    const [command] = (await once(port, "message")) as [WorkerCommand];
    if (command.kind === "leave") return {};
    // Before it looks for a chunk: whoever has seen the sweep's end and no taker need not wait for this thread.
    Atomics.add(shared.control, CTL_TAKERS, 1);
    await copyAll(task, shared, chunkBuffer, command.source);
    return {};
  } catch (error) {
    const typed = toCowcatcherError(error, task.target.name);
    return { error: typed.toDetails(), stack: typed.stack };
  } finally {
    port.close();
  }
}

async function copyAll(
  task: CopyTask,
  shared: SharedState,
  chunkBuffer: Uint8Array,
  source: SourceDescription,
): Promise<void> {
  const isAborting = (): boolean => Atomics.load(shared.control, CTL_RUN) === RUN_ABORTING;
  const { reader, writer } = withFaults(
    process.env[FAULTS_VARIABLE],
    openAnySource(source, isAborting, !isRemote(task.target)),
    openTarget(task.target, isAborting),
    {
      control: shared.control,
      workerIndex: task.workerIndex,
      chunkBytes: shared.geometry.chunkBytes,
      sourceName: source.name,
      targetName: task.target.name,
    },
  );
  try {
    const drainers = laneBuffers(task, shared, chunkBuffer, source).map((buffer, lane) =>
      drainerOf(task, shared, reader, writer, buffer, lane),
    );
    const [only] = drainers;
    if (only !== undefined && drainers.length === 1) await drive(only.run(), shared.control);
    else await driveLanes(drainers, shared.control);
    if (!isAborting()) await writer.finish?.();
  } finally {
    reader.close();
    writer.close();
  }
}

/**
 * A chunk buffer for each chunk that this worker has in hand at a time: one, unless source or target is a server
 * whose answers take their time whatever the processor does.
 */
function laneBuffers(
  { target, workerCount }: CopyTask,
  shared: SharedState,
  chunkBuffer: Uint8Array,
  source: SourceDescription,
): Uint8Array[] {
  const buffers = [chunkBuffer];
  // One that waits for captures blocks its thread.
  if (shared.buffers.capturedOnly === true) return buffers;
  // Standard output takes the disk in order, so one chunk at a time.
  if (target.format === "stdout" || (!isRemote(source) && !isRemote(target))) return buffers;
  // Such a source is read by blocking calls, best into memory that is in the cache still.
  if (!isRemote(target) && source.format === "nbd" && isForBlocking(parseNbdUri(source.uri))) return buffers;
  // An object store answers each request in tens of milliseconds, however many there are.
  const all =
    target.format === "repository" || source.format === "repository" ? LANES_TO_STORE : LANES_OF_ALL_WORKERS;
  const laneCount = Math.max(1, Math.min(MAX_LANES, Math.floor(all / workerCount)));
  while (buffers.length < laneCount) {
    buffers.push(keptPages(buffers.length, shared.geometry.chunkBytes, target.name));
  }
  return buffers;
}

/** Whether it answers in its own time, so that others go on meanwhile. */
function isRemote(place: SourceDescription | TargetDescription): boolean {
  return (
    place.format === "nbd" || place.format === "rbd" || (place.format === "repository" && place.isRemote)
  );
}

function drainerOf(
  task: CopyTask,
  shared: SharedState,
  reader: SourceReader,
  writer: TargetWriter,
  chunkBuffer: Uint8Array,
  lane: number,
): Drainer {
  const { readAhead, workerIndex } = task;
  return new Drainer({
    shared,
    reader,
    writer,
    zeroUnitBytes: task.zeroUnitBytes,
    topOnly: task.topOnly,
    hasForeignCaptures: task.hasForeignCaptures,
    spill: task.spill === null ? null : new SpillFile(task.spill, shared.geometry),
    chunkBuffer,
    ...(readAhead !== null && {
      readAhead: {
        ...readAhead,
        part: workerIndex * MAX_LANES + lane,
        writeBuffer: keptPages(MAX_LANES + lane, shared.geometry.chunkBytes, task.target.name),
      },
    }),
    onSourceError: task.onSourceError,
    onTargetError: task.onTargetError,
    targetRetries: task.targetRetries,
    onStop(error) {
      Atomics.compareExchange(shared.control, CTL_RUN, RUN_RUNNING, RUN_PAUSED);
      send(task.port, { kind: "stopped", error: error.toDetails() });
    },
    now: () => process.hrtime.bigint(),
  });
}

/** As `drive`, but where that one blocks the thread these let each other go on. */
function driveLanes(drainers: readonly Drainer[], control: Int32Array): Promise<void> {
  return driveTogether(drainers, {
    control,
    // A claim lasts for microseconds; only a pause is longer.
    onWait: ({ words, index, value }) =>
      Atomics.wait(words, index, value, SHORT_WAIT_MS) === "timed-out" ? delay(LANE_RECHECK_MS) : undefined,
    longestSleepMs: LANE_SLEEP_MS,
  });
}

async function drive(steps: Generator<DrainStep, void, void>, control: Int32Array): Promise<void> {
  let result = steps.next();
  while (!result.done) {
    const step = result.value;
    switch (step.kind) {
      case "step":
        break;
      case "wait":
        Atomics.wait(step.words, step.index, step.value, RECHECK_MS);
        break;
      case "sleep":
        sleepUntil(step.untilNs, control);
        break;
      case "promise":
        try {
          await step.promise;
        } catch (error) {
          result = steps.throw(error);
          continue;
        }
        break;
    }
    result = steps.next();
  }
}

/**
 * Sleeps on the run state, so that a change of it (pause, resume, the end) wakes the worker. Not for long, as another
 * speed changes no word: its notification may come just before the wait begins.
 */
function sleepUntil(untilNs: bigint, control: Int32Array): void {
  const state = Atomics.load(control, CTL_RUN);
  if (state === RUN_ABORTING) return;
  const ms = Number(untilNs - process.hrtime.bigint()) / 1e6;
  if (ms > 0) Atomics.wait(control, CTL_RUN, state, Math.min(ms, RECHECK_MS));
}

function send(port: MessagePort, message: WorkerMessage): void {
  port.postMessage(message);
}
