// File systems whose modes are fixed (SMB, WebDAV, gvfs) refuse chmod and chown: no reason to fail.
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, expect, it, vi } from "vitest";
import type * as Calls from "../../../src/block/file/calls.js";
import { createTarget } from "../../../src/target/create.js";
import { openTarget } from "../../../src/target/writer.js";

const refused = vi.hoisted(() =>
  vi.fn(() => Promise.reject(Object.assign(new Error("EPERM"), { code: "EPERM" }))),
);
vi.mock("../../../src/block/file/calls.js", async (original) => ({
  ...(await original<typeof Calls>()),
  changeMode: refused,
  changeOwner: refused,
}));

let folder: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "cowcatcher-modes-"));
});
afterEach(() => rmSync(folder, { recursive: true, force: true }));

it.each(["a new file", "one that is there"])("chmod that is refused fails no target: %s", async (what) => {
  const path = join(folder, "target.raw");
  if (what !== "a new file") writeFileSync(path, "an older backup");
  const target = await createTarget({
    path,
    format: "raw",
    sizeBytes: 512,
    clusterSizeBytes: 65536,
    force: true,
    direct: false,
  });
  const writer = openTarget(target.description);
  await writer.write(Buffer.alloc(512, 7), 0, 512, 0);
  writer.close();
  await target.finish();
  expect(readFileSync(path).equals(Buffer.alloc(512, 7))).toBe(true);
  expect(refused).toHaveBeenCalled();
});
