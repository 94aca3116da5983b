// What a live backup is written to, and how much of the disk: made before T0. Main thread.

import { isRbdAddress } from "../../rbd/address.js";
import { createTarget } from "../../target/create.js";
import type { Target, TargetOptions } from "../../target/target.js";
import { LIVE_WORKER_NICENESS } from "../copy/run.js";
import { RemoteTarget } from "../storage/remote-target.js";
import type { RepositoryOutcome } from "../host.js";
import { type Basis, findBasis } from "./basis.js";
import type { HostedJobParts } from "./hosted-job.js";
import { accessOf } from "./source-access.js";

export interface LiveTarget {
  target: Target;
  basis: Basis;
  /** Of a disk of a backup in a repository. */
  outcome?: (() => RepositoryOutcome) | undefined;
}

/** @throws CowcatcherError; nothing is left then. */
export async function makeLiveTarget(parts: HostedJobParts): Promise<LiveTarget> {
  const { options, node, tracker, signal, group } = parts;
  if (options.repository !== undefined && group !== undefined) {
    const { sizeBytes, image } = node;
    return group.add(options.repository, { sizeBytes, format: image.format }, tracker, signal);
  }
  const basis = await findBasis(node.nodeName, options, tracker, parts.basisRefusal);
  try {
    return { target: await makeTarget(parts, basis), basis };
  } catch (error) {
    basis.changes?.end();
    basis.held?.end();
    throw error;
  }
}

async function makeTarget(
  { options, node, hand, signal }: HostedJobParts,
  { changes }: Basis,
): Promise<Target> {
  const isIncremental = changes !== undefined;
  const isPart = isIncremental || options.oldDataOnly === true;
  const isFallback = options.since !== undefined && !isIncremental;
  const targetOptions: TargetOptions = {
    path: options.target,
    inPlace: isPart && options.targetFormat === "raw",
    isPart,
    format: options.targetFormat,
    sizeBytes: node.sizeBytes,
    clusterSizeBytes: options.clusterSizeBytes,
    // A full one stands by itself.
    backingFile: isFallback ? undefined : options.backingFile,
    backingFormat: isFallback ? undefined : options.backingFormat,
    compression: options.compression,
    force: options.force,
    direct: options.direct,
    targetRetries: options.targetRetries,
    targetSnapshot: options.targetSnapshot,
    niceness: LIVE_WORKER_NICENESS,
    sourceAccess: await accessOf(node.image),
  };
  // An RBD image has a thread of its own (rbd/keeper.ts).
  if (hand === null || isRbdAddress(options.target)) {
    return createTarget({ ...targetOptions, isCancelled: () => signal.aborted });
  }
  return RemoteTarget.make(hand, targetOptions, signal);
}
