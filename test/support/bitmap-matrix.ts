// The matrix of QEMU's iotest 257: a bitmap's sync modes, and a first backup that comes to its end or is cancelled when it
// has copied everything, with what a guest writes before, while and after. QEMU itself says what the bitmaps are at each
// step.
import { join } from "node:path";
import { expect } from "vitest";
import type { Judged } from "./qmp-judge.js";
import { mustRun } from "./server.js";

export interface MatrixCase {
  sync: "bitmap" | "full" | "top";
  mode: "on-success" | "never" | "always";
  isCancelled: boolean;
}

/** 257's patterns: whole granules, parts of them, neighbours to the left and to the right. */
const GROUPS = [
  ["write -P 0x49 0 64k", "write -P 0x6c 1M 64k", "write -P 0x6f 32M 64k", "write -P 0x76 65472k 64k"],
  ["write -P 0x65 0 64k", "write -P 0x77 992k 64k", "write -P 0x72 32800k 64k", "write -P 0x69 65408k 64k"],
  [
    "write -P 0x74 64k 64k",
    "write -P 0x69 928k 64k",
    "write -P 0x6e 32864k 64k",
    "write -P 0x67 65408k 128k",
  ],
  [
    "write -P 0xaa 64k 192k",
    "write -P 0xbb 864k 64k",
    "write -P 0xcc 32928k 64k",
    "write -P 0xdd 65280k 64k",
  ],
] as const;

export const MATRIX_SIZE = 64 * 2 ** 20;

export const ALL_CASES: MatrixCase[] = (["bitmap", "full", "top"] as const).flatMap((sync) =>
  (["on-success", "never", "always"] as const)
    .filter((mode) => sync === "bitmap" || mode !== "never")
    .flatMap((mode) => [false, true].map((isCancelled) => ({ sync, mode, isCancelled }))),
);

/** Both disks are as they were made, or as an earlier case left them. */
export async function runMatrixCase(judged: Judged, { sync, mode, isCancelled }: MatrixCase): Promise<void> {
  const backup = async (target: string, kind: string): Promise<void> => {
    await judged.addTarget(target);
    await judged.same("blockdev-backup", {
      ...{ device: "disk", target, "job-id": target, sync: kind, bitmap: "bitmap0", "bitmap-mode": mode },
      "auto-finalize": false,
    });
    await judged.untilJob(target, "pending");
  };
  await judged.write(...GROUPS[0]);
  await judged.same("block-dirty-bitmap-add", { node: "disk", name: "bitmap0", granularity: 65_536 });
  await judged.write(...GROUPS[1]);
  expect((await judged.sameBitmaps())[0]?.count).toBe(6 * 65_536);
  const first = `first-${sync}-${mode}-${isCancelled}`;
  await backup(first, sync);
  await judged.write(...GROUPS[2]);
  // The named one as at T0, busy, and a nameless one that records.
  expect(await judged.sameBitmaps()).toHaveLength(2);
  await judged.same("block-dirty-bitmap-clear", { node: "disk", name: "bitmap0" });
  await judged.same("block-dirty-bitmap-remove", { node: "disk", name: "bitmap0" });
  await judged.same(isCancelled ? "job-cancel" : "job-finalize", { id: first });
  await judged.untilJob(first, "gone");
  await judged.sameBitmaps();
  await judged.write(...GROUPS[3]);
  await judged.sameBitmaps();
  const second = `second-${sync}-${mode}-${isCancelled}`;
  await backup(second, "bitmap");
  await judged.same("job-finalize", { id: second });
  await judged.untilJob(second, "gone");
  const [bitmap] = await judged.sameBitmaps();
  expect(bitmap?.count === 0).toBe(mode !== "never");
  await judged.same("block-dirty-bitmap-remove", { node: "disk", name: "bitmap0" });
  for (const node of [first, second]) await judged.same("blockdev-del", { "node-name": node });
  if (isCancelled) return;
  for (const name of [first, second]) {
    const [our, their] = judged.peers.map(({ folder }) => join(folder, name));
    await mustRun("qemu-img", "compare", our ?? "", their ?? "");
  }
}
