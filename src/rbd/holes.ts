// What of an image reads as zeroes, from rbd_diff_iterate2 against the beginning of time: it reports what exists, and what
// it does not report is empty. A clone's parent counts.
//
// With fast-diff it goes by whole objects, out of the object map: a TiB is a quarter of a million objects and a moment.
// Where the map is not to be trusted, or is not there, each object is asked, and then what a discard has left within
// an object is a hole as well.
//
// The callback is the one place where librbd calls JavaScript. It does so in the calling thread and within the call: librbd
// collects what its own threads find and hands it out in order there (DiffIterate, OrderedThrottle). Keeper's thread.

import { ExtentMapBuilder } from "../block/extent-map.js";
import { constants } from "node:os";
import type { ImageFacts } from "./connect.js";
import { rbdError } from "./errors.js";
import type { Holes } from "./keeper-protocol.js";
import type { Librbd } from "./librbd.js";

/** Then the rest is read, which is slower and no worse. */
const MAP_LIMIT_MS = 15_000;
const ECANCELED = -constants.errno.ECANCELED;

/** @throws CowcatcherError IO */
export function gatherHoles(
  native: Librbd,
  image: bigint,
  { sizeBytes, hasFastDiff }: ImageFacts,
  name: string,
): Holes {
  const map = new ExtentMapBuilder();
  const deadlineMs = performance.now() + MAP_LIMIT_MS;
  const result = native.diffIterate(image, sizeBytes, hasFastDiff, (offsetBytes, lengthBytes, exists) => {
    if (map.isFull || performance.now() > deadlineMs) return ECANCELED;
    map.add(offsetBytes, true);
    if (!map.isFull) map.add(offsetBytes + lengthBytes, exists === 0);
    return 0;
  });
  if (result < 0 && result !== ECANCELED) throw rbdError("ask for the image's holes", name, result);
  if (result === 0 && !map.isFull) map.add(sizeBytes, true);
  return map.finish();
}
