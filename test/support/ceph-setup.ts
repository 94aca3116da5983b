// One Ceph for all test files of a run, started when the first of them asks for it (ceph.ts) and ended with the run.
// vitest's main process starts it, as the processes of the test files come and go.

import { mkdtempSync, rmSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { TestProject } from "vitest/node";
import { type CephCluster, startCeph } from "../../bench/lib/ceph.js";

declare module "vitest" {
  interface ProvidedContext {
    /** Path of a socket: whoever connects is told the cluster's folder, or "!" and why there is none. */
    cephSocket: string;
  }
}

export default function setup(project: TestProject): () => Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), "cowcatcher-ceph-"));
  const socket = join(folder, "ask");
  let starting: Promise<CephCluster> | undefined;
  const server = createServer((connection) => {
    connection.on("error", () => undefined);
    starting ??= startCeph(join(folder, "cluster"));
    starting.then(
      (cluster) => connection.end(cluster.folder),
      (error: unknown) => connection.end(`!${String(error)}`),
    );
  });
  server.listen(socket);
  project.provide("cephSocket", socket);
  return async () => {
    server.close();
    await starting?.then((cluster) => cluster.stop()).catch(() => undefined);
    rmSync(folder, { recursive: true, force: true });
  };
}
