// `serve` is restarted, and killed, under a real guest whose QEMU waits for it (reconnect-delay): the guest's writes are late,
// and that is all.
import { join } from "node:path";
import { afterEach, expect, it } from "vitest";
import { bootGuest, findGuestKernel } from "../support/guest-kernel.js";
import {
  committed,
  contentOf,
  endGuest,
  expectCleanFileSystem,
  filesOf,
  makeExt4,
  writingGuest,
} from "../support/numbered-files.js";
import { scratchFolder, Server, stopAll } from "../support/server.js";

const kernel = findGuestKernel();
const GUEST_MS = 240_000;
afterEach(stopAll);

it("a guest sees no error when its server is restarted, or killed and started again", async ({ skip }) => {
  if ("missing" in kernel) return skip(kernel.missing);
  const folder = scratchFolder();
  const disk = join(folder, "disk.raw");
  await makeExt4(disk, 64 * 2 ** 20);
  const start = (): Promise<Server> => Server.start(folder, [disk], { args: ["-f", "raw"] });
  let server = await start();
  const guest = await bootGuest(kernel, {
    ...{ script: writingGuest(":"), initramfs: join(folder, "initramfs"), socket: server.socket },
    ...{ exportName: "disk", reconnectDelaySeconds: 120 },
  });
  await committed(guest, 20, GUEST_MS);
  for (const signal of ["SIGTERM", "SIGKILL", "SIGTERM"] as const) {
    server.process.kill(signal);
    const { code } = await server.process.end();
    expect(code).toBe(signal === "SIGTERM" ? 0 : 137);
    server = await start();
    await committed(guest, 20, GUEST_MS);
  }
  const written = await endGuest(guest, GUEST_MS);
  expect((await server.stop()).code).toBe(0);
  await expectCleanFileSystem(disk);
  const files = await filesOf(disk, join(folder, "files"));
  expect(files.size).toBe(written);
  for (const [number, content] of files) expect(content).toBe(contentOf(number));
});
