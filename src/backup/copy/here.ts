// A copier in the main thread: the first of an offline copy between local files. It begins where a thread would still
// boot, and where there is little to copy no thread is booted at all.
//
// It works in short turns, between which signals are heard and progress is shown, and it is the first one alone: a file
// system that stops answering would hold the command up, so after a while threads take over (run.ts).

import { setImmediate as nextTurn, setTimeout as delay } from "node:timers/promises";
import type { Image, SourceDescription } from "../../block/device.js";
import { statFile, statFileSystem } from "../../block/file/calls.js";
import { LOCAL_FILE_SYSTEMS } from "../../block/file/local-file-systems.js";
import { Drainer, type DrainOptions } from "../../cow/drain.js";
import { keptPages } from "../../cow/page-memory.js";
import { CTL_RUN, RUN_ABORTING } from "../../cow/shared.js";
import type { TargetWriter } from "../../cow/target-writer.js";
import { openSource } from "../../image/reader.js";
import { RawWriter } from "../../target/file/raw.js";
import { NullWriter } from "../../target/null.js";
import { Qcow2Writer } from "../../target/qcow2/writer.js";
import type { TargetDescription } from "../../target/target.js";
import { driveTogether } from "./drive-async.js";
import { FAULTS_VARIABLE } from "./faults.js";

/** So long signals and timers wait at most, besides the chunk in hand. */
const TURN_MS = 5;
const RECHECK_MS = 1;
/** Chunks in hand at a time: one is written while libuv's pool reads the other. */
const LANES = 2;
const LONGEST_SLEEP_MS = 50;

/**
 * Whether the main thread may copy from this image to that target: files of file systems of this machine, whose calls
 * end, without work for a processor besides. Where faults were asked for they are the threads'.
 */
export async function mayCopyHere(
  image: Image,
  target: TargetDescription,
  direct: boolean,
): Promise<boolean> {
  if (direct || process.env[FAULTS_VARIABLE] !== undefined) return false;
  const descriptors = descriptorsOf(target);
  if (descriptors === undefined) return false;
  for (let layer: Image | null = image; layer !== null; layer = layer.backing) {
    if (layer.files.length === 0) return false;
    for (const { fd } of layer.files) descriptors.push(fd);
  }
  for (const fd of descriptors) if (!(await isLocalFile(fd))) return false;
  return true;
}

/** Undefined: a target that needs a thread. */
function descriptorsOf(target: TargetDescription): number[] | undefined {
  if (target.format === "null") return [];
  if (target.format === "raw" && !target.direct) return [target.fd];
  if (target.format === "qcow2" && !target.direct && target.compression === null)
    return [target.dataFd, target.metadataFd];
  return undefined;
}

async function isLocalFile(fd: number): Promise<boolean> {
  try {
    if (!(await statFile(fd)).isFile()) return false;
    return LOCAL_FILE_SYSTEMS.has((await statFileSystem(`/proc/self/fd/${fd}`)).type);
  } catch {
    return false;
  }
}

export type CopierOptions = Omit<DrainOptions, "reader" | "writer" | "chunkBuffer" | "spill" | "now"> & {
  /** From then on the copier ends with the chunk in hand. */
  isRelieved: () => boolean;
};

/** Copies chunks until none is left, it is relieved or the job is aborted. @throws CowcatcherError */
export async function copyHere(
  source: SourceDescription,
  target: TargetDescription,
  options: CopierOptions,
): Promise<void> {
  const { shared } = options;
  const isAborting = (): boolean => Atomics.load(shared.control, CTL_RUN) === RUN_ABORTING;
  const reader = openSource(source, isAborting, true, true);
  try {
    const writer = openWriter(target);
    try {
      const now = (): bigint => process.hrtime.bigint();
      const drainers = Array.from({ length: LANES }, (_, lane) => {
        const chunkBuffer = keptPages(lane, shared.geometry.chunkBytes, target.name);
        return new Drainer({ ...options, reader, writer, chunkBuffer, spill: null, now });
      });
      await driveInTurns(drainers, shared.control);
      if (!isAborting()) await writer.finish?.();
    } finally {
      writer.close();
    }
  } finally {
    reader.close();
  }
}

function openWriter(target: TargetDescription): TargetWriter {
  if (target.format === "raw") return new RawWriter(target);
  if (target.format === "qcow2") return new Qcow2Writer(target);
  return new NullWriter();
}

async function driveInTurns(drainers: readonly Drainer[], control: Int32Array): Promise<void> {
  let turnEndsMs = performance.now() + TURN_MS;
  const giveWay = async (): Promise<void> => {
    await nextTurn();
    turnEndsMs = performance.now() + TURN_MS;
  };
  await driveTogether(drainers, {
    control,
    onStep: () => (performance.now() < turnEndsMs ? undefined : giveWay()),
    onWait: () => delay(RECHECK_MS),
    longestSleepMs: LONGEST_SLEEP_MS,
  });
}
