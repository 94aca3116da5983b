// What the main thread and the keeper of an image say to each other.

import type { ErrorDetails } from "../errors.js";
import type { RbdAddress } from "./address.js";

interface OpenRequest {
  address: RbdAddress;
  /** What errors call it: the address as the user gave it. */
  name: string;
  /** See door.ts. */
  door: SharedArrayBuffer;
}

export type KeeperRequest =
  | (OpenRequest & {
      kind: "open-target";
      sizeBytes: number;
      /** Write an image that is there. */
      force: boolean;
      /** To be made at the end: it must not be there yet. */
      snapshot: string | undefined;
      /** Of the keeper and of the threads that librbd starts for it, 0 to 19. */
      niceness: number;
    })
  | (OpenRequest & {
      kind: "open-source";
      /** Refuse an image that another client may write. */
      lock: boolean;
    })
  /** What of the image reads as zeroes. */
  | { kind: "holes" }
  /** All that was written is on stable storage. */
  | { kind: "flush" }
  /** The snapshot, if one is wanted, and the final name. */
  | { kind: "commit"; snapshot: string | undefined }
  /** Closes the image, and removes one that is unfinished. */
  | { kind: "release" };

/** Of both open requests. */
export interface OpenedImage {
  image: bigint;
  sizeBytes: number;
  objectBytes: number;
  hasFastDiff: boolean;
  /** All of it reads as zeroes. */
  isNew: boolean;
}

/** Of "holes"; see block/extent-map.ts. */
export interface Holes {
  runs: SharedArrayBuffer;
  runCount: number;
}

export type KeeperReply =
  | { kind: "done"; opened?: OpenedImage; holes?: Holes }
  | { kind: "failed"; error: ErrorDetails; stack: string | undefined };
