// cowcatcher's own commands about checkpoints: what the server remembers to have changed since when.

import type { TrackingInfo } from "../backup/host.js";
import type { JsonObject } from "../qmp/protocol.js";
import { optional, string } from "../qmp/schema.js";
import { type Command, command } from "./command.js";

export function trackingToWire(tracking: TrackingInfo): JsonObject {
  return {
    mode: tracking.mode,
    state: tracking.state,
    granularity: tracking.granularityBytes,
    "hot-extents": tracking.hotExtents,
    "log-waits": tracking.logWaits,
    "loss-reason": tracking.lossReason ?? undefined,
    "lost-checkpoints": tracking.lostCheckpoints,
    checkpoints: tracking.checkpoints.map(({ name, uuid, createdMs }) => ({
      name,
      uuid,
      "created-ms": createdMs,
    })),
  };
}

export const CHECKPOINT_COMMANDS: Record<string, Command> = {
  "x-query-checkpoints": command({}, async (_args, { host }) => {
    const answer: JsonObject[] = [];
    for (const { name: disk, tracking } of host.disks()) {
      for (const { name, uuid, createdMs } of tracking?.checkpoints ?? []) {
        const changed = await host.changedBytes(disk, name);
        answer.push({ disk, name, uuid, "created-ms": createdMs, "changed-bytes": changed });
      }
    }
    return answer;
  }),
  "x-checkpoint-delete": command({ name: string, device: optional(string) }, async (args, { host }) => {
    await host.deleteCheckpoint(args.name, args.device);
    return {};
  }),
};
