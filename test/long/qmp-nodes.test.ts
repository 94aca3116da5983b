// Nodes over NBD, beside QEMU: targets of a full and an incremental backup, and disks that are exported at run time.
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, expect, it } from "vitest";
import { qemuNbd } from "../support/nbd-servers.js";
import { Judged, type Peer } from "../support/qmp-judge.js";
import { mustRun, scratchFolder, stopAll, until } from "../support/server.js";

const SIZE = 16 * 2 ** 20;
let judged: Judged;
/** Of each peer, the socket of a server of its own over `place`. */
const sockets = new Map<Peer, string>();

beforeEach(async () => {
  judged = await Judged.start(scratchFolder(), SIZE);
  for (const peer of judged.peers) {
    writeFileSync(join(peer.folder, "place"), Buffer.alloc(SIZE, 0xee));
    sockets.set(peer, (await qemuNbd(join(peer.folder, "place"))).socket);
  }
});
afterEach(async () => {
  await judged.close();
  await stopAll();
});

const nbd = (peer: Peer): object => ({
  driver: "nbd",
  server: { type: "unix", path: sockets.get(peer) },
  export: "",
});

const NODES: Record<string, (peer: Peer) => object> = {
  nbd: (peer) => ({ ...nbd(peer), "node-name": "place" }),
  "raw over nbd": (peer) => ({ driver: "raw", "node-name": "place", file: nbd(peer) }),
};

function expectPlaces(): void {
  const contents = judged.peers.map(({ folder }) => readFileSync(join(folder, "place")));
  expect(contents[0]?.equals(contents[1] ?? Buffer.alloc(0))).toBe(true);
}

it.each(Object.keys(NODES))("%s takes a full backup, and an incremental one in place", async (kind) => {
  const node = NODES[kind] ?? nbd;
  await judged.write("write -P 1 0 1M", "write -P 2 5M 192k");
  await judged.same("blockdev-add", node);
  await judged.same("blockdev-add", node);
  await judged.same("block-dirty-bitmap-add", { node: "disk", name: "b" });
  for (const [id, more] of Object.entries({ full: {}, incremental: { bitmap: "b" } })) {
    await judged.write(`write -P ${id.length} 9M 64k`, "write -z 64k 64k", "discard 5M 64k");
    await judged.same("blockdev-backup", {
      ...{ "job-id": id, device: "disk", target: "place", sync: id, speed: 4096, ...more },
    });
    await judged.same("blockdev-del", { "node-name": "place" });
    await judged.same("block-job-set-speed", { device: id, speed: 0 });
    await judged.untilJob(id, "gone");
    expect(judged.sameEvents(id)).toContain("BLOCK_JOB_COMPLETED");
    for (const peer of judged.peers) {
      const place = join(peer.folder, "place");
      await mustRun("qemu-img", "compare", "-U", "-f", "raw", "-F", "raw", peer.uri, place);
    }
  }
  expect(await judged.sameBitmaps()).toMatchObject([{ name: "b", count: 0 }]);
  await judged.same("blockdev-del", { "node-name": "place" });
  await judged.same("blockdev-del", { "node-name": "place" });
});

it.each(Object.keys(NODES))("%s is exported for writing, and goes", async (kind) => {
  await judged.same("blockdev-add", NODES[kind] ?? nbd);
  const exported = { type: "nbd", id: "e", "node-name": "place", name: "shown", writable: true };
  await judged.same("block-export-add", exported);
  await judged.same("block-export-add", exported);
  await judged.same("blockdev-del", { "node-name": "place" });
  await judged.writeTo("shown", "write -P 7 3M 64k", "write -z 4M 1M", "read -P 0xee 8M 64k", "flush");
  expectPlaces();
  await judged.same("block-export-del", { id: "e" });
  for (const { client, name } of judged.peers) {
    await until(`the export of ${name} is gone`, () =>
      client.messages.some(({ event, data }) => event === "BLOCK_EXPORT_DELETED" && data?.["id"] === "e"),
    );
  }
  await judged.same("block-export-del", { id: "e" });
  await judged.same("blockdev-del", { "node-name": "place" });
});
