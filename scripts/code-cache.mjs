// Lets V8 compile the bundles of dist, and keeps what it has made beside them (src/bundle-loader.ts): a part of the build.
// With another Node.js than the build's, as `node scripts/code-cache.mjs`, it adds what that one takes.
//
// What is kept of a file are the functions that were called. So usual commands run here, in one process, on small images.
import { execFileSync } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";

const recorder = resolve("scripts/code-cache-recorder.cjs");
const commands = resolve("scripts/code-cache-commands.cjs");
const folder = mkdtempSync(join(tmpdir(), "cowcatcher-build-"));
try {
  const disk = Buffer.alloc(5 * 2 ** 20);
  disk.fill("guest", 0, 2 ** 20);
  writeFileSync(join(folder, "disk.raw"), disk);
  const environment = { ...process.env };
  delete environment.NODE_OPTIONS;
  delete environment.NODE_V8_COVERAGE;
  execFileSync(process.execPath, ["--require", recorder, commands], {
    cwd: folder,
    env: environment,
    stdio: ["ignore", "ignore", "inherit"],
    timeout: 120_000,
  });
} finally {
  rmSync(folder, { recursive: true, force: true });
}
