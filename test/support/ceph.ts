// A real Ceph for the tests that ask for it: the run's one cluster (ceph-setup.ts), and a pool of its own for each test file.

import { createConnection } from "node:net";
import { text } from "node:stream/consumers";
import { join } from "node:path";
import { inject } from "vitest";
import { mustRun } from "./server.js";

export interface TestPool {
  folder: string;
  conf: string;
  pool: string;
  /** The address of an image in the pool, for cowcatcher and QEMU alike; `behind` as ":rbd_cache=true". */
  address(image: string, behind?: string): string;
  /** `rbd ARGUMENTS…`, its output. */
  rbd(...args: string[]): Promise<string>;
  /** `ceph ARGUMENTS…` */
  ceph(...args: string[]): Promise<string>;
}

/** For beforeAll. @param pool made afresh; no other test file has it */
export async function testPool(pool: string): Promise<TestPool> {
  const answer = await text(createConnection(inject("cephSocket")));
  if (answer.startsWith("!")) throw new Error(answer.slice(1));
  const conf = join(answer, "ceph.conf");
  const rbd = (...args: string[]): Promise<string> => output("rbd", "-c", conf, ...args);
  const ceph = (...args: string[]): Promise<string> => output("ceph", "-c", conf, ...args);
  await ceph("osd", "pool", "create", pool);
  await rbd("pool", "init", pool);
  return {
    folder: answer,
    conf,
    pool,
    rbd,
    ceph,
    address: (image, behind = "") => `rbd:${pool}/${image}:conf=${conf}${behind}`,
  };
}

function output(program: string, ...args: string[]): Promise<string> {
  return mustRun(program, ...args);
}
