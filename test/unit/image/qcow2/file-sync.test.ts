import * as fs from "node:fs";
import { join } from "node:path";
import { afterAll, expect, test } from "vitest";
import { BufferedFile } from "../../../../src/image/qcow2/format/file.js";
import { scratchFolder, stopAll } from "../../../support/server.js";

afterAll(stopAll);

test("after a failed fdatasync no later one is believed: the kernel has dropped the pages", async () => {
  const path = join(scratchFolder(), "disk.qcow2");
  fs.writeFileSync(path, "");
  const fd = fs.openSync(path, "r+");
  const file = new BufferedFile(fd, path);
  // A pipe cannot be synced; then the number is the file's again.
  fs.closeSync(fd);
  const [reused] = [fs.openSync("/proc/self/status", "r")];
  expect(reused).toBe(fd);
  await expect(file.sync()).rejects.toThrow(/flush/);
  fs.closeSync(reused);
  expect(fs.openSync(path, "r+")).toBe(fd);
  await expect(file.sync()).rejects.toThrow(/flush/);
  await file.close();
});
