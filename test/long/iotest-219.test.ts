// QEMU's iotest 219, beside QEMU: a backup's life with each setting of auto-finalize and auto-dismiss, paused and resumed by
// the verbs of jobs and of block jobs in any mixture, and every verb in every state.
import { join } from "node:path";
import { afterAll, beforeAll, expect, it } from "vitest";
import { Judged } from "../support/qmp-judge.js";
import { scratchFolder, stopAll } from "../support/server.js";

const SIZE = 4 * 2 ** 20;
let judged: Judged;

beforeAll(async () => {
  judged = await Judged.start(scratchFolder(), SIZE);
  await judged.write(`write -P 1 0 ${SIZE}`);
});
afterAll(async () => {
  await judged.close();
  await stopAll();
});

const bySuffix = (id: string) => ({
  "job-pause": { id },
  "job-resume": { id },
  "job-complete": { id },
  "job-finalize": { id },
  "job-dismiss": { id },
  "block-job-pause": { device: id },
  "block-job-resume": { device: id },
  "block-job-complete": { device: id },
  "block-job-finalize": { id },
  "block-job-dismiss": { id },
});

it.each([
  { autoFinalize: true, autoDismiss: true },
  { autoFinalize: true, autoDismiss: false },
  { autoFinalize: false, autoDismiss: true },
  { autoFinalize: false, autoDismiss: false },
])("auto-finalize $autoFinalize, auto-dismiss $autoDismiss", async ({ autoFinalize, autoDismiss }) => {
  const id = `job-${autoFinalize}-${autoDismiss}`;
  const verbs = bySuffix(id);
  const say = async (...names: (keyof typeof verbs)[]): Promise<void> => {
    for (const name of names) await judged.same(name, verbs[name]);
  };
  await judged.same("drive-backup", ({ folder }) => ({
    ...{ "job-id": id, device: "disk", target: join(folder, id), sync: "full", speed: 65_536 },
    ...{ "auto-finalize": autoFinalize, "auto-dismiss": autoDismiss },
  }));
  await judged.untilJob(id, "running");
  for (const pause of ["block-job-pause", "job-pause"] as const) {
    for (const resume of ["block-job-resume", "job-resume"] as const) {
      await say(pause);
      await judged.untilJob(id, "paused");
      await say(pause, resume);
      await judged.untilJob(id, "running");
      await say(resume);
    }
  }
  await say("job-complete", "job-finalize", "job-dismiss");
  await say("block-job-complete", "block-job-finalize", "block-job-dismiss");
  await judged.same("block-job-set-speed", { device: id, speed: 0 });
  if (!autoFinalize) {
    await judged.untilJob(id, "pending");
    await say("job-pause", "job-complete", "job-dismiss");
    await say("block-job-pause", "block-job-complete", "block-job-dismiss", "job-finalize");
  }
  if (!autoDismiss) {
    await judged.untilJob(id, "concluded");
    await say("job-pause", "job-complete", "job-finalize");
    await say("block-job-pause", "block-job-complete", "block-job-finalize", "job-dismiss");
  }
  await judged.untilJob(id, "gone");
  expect(judged.sameEvents(id)).toEqual([
    ...["created", "running", "waiting", "pending", ...(autoFinalize ? [] : ["BLOCK_JOB_PENDING"])],
    ...["BLOCK_JOB_COMPLETED", "concluded", "null"],
  ]);
  expect((await judged.same("query-jobs")).return).toEqual([]);
});
