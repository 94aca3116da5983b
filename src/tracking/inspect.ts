// What a tracking folder says of itself, for whoever only looks: nothing is locked, made or judged by the image.

import * as fs from "node:fs";
import { join } from "node:path";
import { isWrittenBySomebody } from "../block/file/locks.js";
import { closeFile, openFile } from "../block/file/fileio.js";
import { errnoOf } from "../errors.js";
import { type Checkpoint, decodeList, LIST_NAME, type Loss } from "./checkpoint-list.js";
import { LOCK_NAME, readIn } from "./folder.js";
import { decodeHead, HEAD_NAME, type TrackingMode } from "./head.js";

export interface InspectedTracking {
  /**
   * `clean`: closed, and believed if the image is as it was then. `in-use`: a server has it. `unclean`: the last one did
   * not close it; the next start judges what is to be believed. `lost`: nothing of it is. `damaged`: not what it should be.
   */
  state: "clean" | "in-use" | "unclean" | "lost" | "damaged";
  mode?: TrackingMode;
  generation?: string;
  granularityBytes?: number;
  /** That are over and kept, and the one that writes go to. */
  epochCount?: number;
  checkpoints: readonly Checkpoint[];
  loss: Loss | null;
}

/** @returns undefined where there is no such folder. @throws CowcatcherError IO */
export async function inspectTracking(folder: string): Promise<InspectedTracking | undefined> {
  const [headFile, listFile] = [await readIn(folder, HEAD_NAME), await readIn(folder, LIST_NAME)];
  if (headFile === null && listFile === null) return undefined;
  const head = decodeHead(headFile ?? new Uint8Array());
  const list = decodeList(listFile ?? new Uint8Array());
  if (head === undefined || list === undefined || head.generation !== list.generation) {
    return { state: "damaged", checkpoints: [], loss: null };
  }
  const isOpen = head.state === "open";
  return {
    state: isOpen
      ? (await isInUse(folder))
        ? "in-use"
        : "unclean"
      : head.state === "lost"
        ? "lost"
        : "clean",
    mode: head.mode,
    generation: head.generation,
    granularityBytes: head.granularityBytes,
    epochCount: list.epochs.length + 1,
    checkpoints: head.state === "lost" ? [] : list.checkpoints,
    loss: list.loss,
  };
}

async function isInUse(folder: string): Promise<boolean> {
  let fd: number;
  try {
    fd = await openFile(join(folder, LOCK_NAME), fs.constants.O_RDONLY);
  } catch (error) {
    if (errnoOf(error) === "ENOENT") return false;
    throw error;
  }
  try {
    return isWrittenBySomebody(fd);
  } finally {
    await closeFile(fd);
  }
}
