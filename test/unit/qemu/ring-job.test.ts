// A ring's job that is gone before the disk is read has let the guest overwrite what nobody has kept.
import { expect, it } from "vitest";
import type { JsonObject } from "../../../src/qmp/protocol.js";
import type { Visit } from "../../../src/qemu/monitor.js";
import { checkRingJob } from "../../../src/qemu/ring.js";

function visitOf(jobs: JsonObject[]): Visit {
  return { path: "/q.sock", list: () => Promise.resolve(jobs) } as unknown as Visit;
}

it.each(["running", "paused"])("passes one that is %s", async (status) => {
  await checkRingJob(visitOf([{ id: "other" }, { id: "mine", status }]), "mine");
});

it.each<[string, JsonObject[]]>([
  ["is not there", [{ id: "other", status: "running" }]],
  ["ends", [{ id: "mine", status: "aborting" }]],
  ["has failed", [{ id: "mine", status: "running", error: "No space left on device" }]],
])("refuses one that %s", async (_, jobs) => {
  await expect(checkRingJob(visitOf(jobs), "mine")).rejects.toMatchObject({ code: "SNAPSHOT" });
});
