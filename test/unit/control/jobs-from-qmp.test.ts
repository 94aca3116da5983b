import { rmSync, mkdtempSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, expect, it } from "vitest";
import { watchJob } from "../../../src/control/jobs-from-qmp.js";
import { ControlClient } from "../../../src/qmp/client.js";

const cleanups: (() => void)[] = [];
afterEach(() => {
  for (const cleanup of cleanups.splice(0)) cleanup();
});

/** A server that, asked for its jobs, says this and is gone. */
async function serverThatEndsWith(lastWords: object[]): Promise<string> {
  const folder = mkdtempSync(join(tmpdir(), "cowcatcher-test-"));
  const path = join(folder, "control.sock");
  const server = createServer((socket) => {
    const say = (message: object) => socket.write(`${JSON.stringify(message)}\r\n`);
    say({ QMP: { version: { qemu: { major: 7, minor: 2, micro: 0 }, package: "" }, capabilities: [] } });
    socket.on("data", (data) => {
      const { execute, id } = JSON.parse(data.toString()) as { execute: string; id?: unknown };
      if (execute === "qmp_capabilities") return say({ return: {}, id });
      for (const message of lastWords) say(message);
      return socket.end();
    });
  });
  await new Promise<void>((resolve) => server.listen(path, resolve));
  cleanups.push(() => {
    server.close();
    rmSync(folder, { recursive: true, force: true });
  });
  return path;
}

const CANCELLED = {
  event: "BLOCK_JOB_CANCELLED",
  timestamp: { seconds: 1, microseconds: 0 },
  data: {
    device: "disk-1",
    type: "backup",
    "x-cowcatcher": { error: { code: "SERVER_ENDED", object: "b.raw", problem: "the server was ended" } },
  },
};

it("a job whose end is told while the question for it is open has that end, not the lost connection", async () => {
  const client = await ControlClient.connect(await serverThatEndsWith([CANCELLED]));
  const result = await watchJob(client, "disk-1", () => undefined);
  expect(result.error?.code).toBe("SERVER_ENDED");
});

it("a job whose server is gone without a word is lost with the connection", async () => {
  const client = await ControlClient.connect(await serverThatEndsWith([]));
  await expect(watchJob(client, "disk-1", () => undefined)).rejects.toMatchObject({ code: "IO" });
});
