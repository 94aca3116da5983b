// A real S3 server for the tests that ask for it: Debian's radosgw over the run's one Ceph (ceph.ts). It ends with the test
// file that has started it.
import { spawnSync } from "node:child_process";
import { mkdirSync } from "node:fs";
import { createServer } from "node:net";
import { join } from "node:path";
import { AwsClient } from "aws4fetch";
import { testPool, type TestPool } from "./ceph.js";
import { mustRun, Process, scratchFolder, until } from "./server.js";

export const hasRadosgw = spawnSync("sh", ["-c", "command -v radosgw radosgw-admin"]).status === 0;

export interface S3User {
  AWS_ACCESS_KEY_ID: string;
  AWS_SECRET_ACCESS_KEY: string;
}

export class Radosgw {
  #process: Process | undefined;

  private constructor(
    readonly pool: TestPool,
    readonly port: number,
    readonly folder: string,
    readonly user: S3User,
  ) {}

  /** For beforeAll. Has a user, and his bucket `backups`. */
  static async start(): Promise<Radosgw> {
    const pool = await testPool("radosgw");
    const folder = scratchFolder();
    mkdirSync(join(folder, "run"));
    const caps = ["mon", "allow rw", "osd", "allow rwx"];
    await pool.ceph("auth", "get-or-create", "client.rgw", ...caps, "-o", join(folder, "rgw.keyring"));
    const user = await makeUser(pool, "backup");
    const gateway = new Radosgw(pool, await freePort(), folder, user);
    await gateway.serve();
    await gateway.makeBucket(user, "backups");
    return gateway;
  }

  get endpoint(): string {
    return `http://127.0.0.1:${this.port}`;
  }

  /** Begins to answer, or does again after `kill`. */
  async serve(): Promise<void> {
    const settings = {
      keyring: join(this.folder, "rgw.keyring"),
      "rgw-frontends": `beast endpoint=127.0.0.1:${this.port}`,
      "rgw-data": this.folder,
      "run-dir": join(this.folder, "run"),
      "log-file": join(this.folder, "rgw.log"),
      "rgw-rados-pool-pg-num-min": "8",
    };
    const words = Object.entries(settings).map(([name, value]) => `--${name}=${value}`);
    const server = new Process("radosgw", ["-c", this.pool.conf, "-n", "client.rgw", "-f", ...words]);
    this.#process = server;
    await until("radosgw answers", async () => {
      if (server.over) throw new Error(server.stderr);
      return await fetch(this.endpoint).then(
        ({ ok }) => ok,
        () => false,
      );
    });
  }

  async kill(): Promise<void> {
    this.#process?.kill("SIGKILL");
    await this.#process?.end();
  }

  /** One who has no rights on what others have. */
  stranger(): Promise<S3User> {
    return makeUser(this.pool, "stranger");
  }

  async makeBucket({ AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY }: S3User, bucket: string): Promise<void> {
    const client = new AwsClient({
      accessKeyId: AWS_ACCESS_KEY_ID,
      secretAccessKey: AWS_SECRET_ACCESS_KEY,
      region: "us-east-1",
      service: "s3",
    });
    const made = await client.fetch(`${this.endpoint}/${bucket}`, { method: "PUT" });
    if (!made.ok) throw new Error(`no bucket: ${made.status} ${await made.text()}`);
  }
}

async function makeUser({ conf }: TestPool, name: string): Promise<S3User> {
  const keys = [`--access-key=${name}-key`, `--secret=${name}-secret`];
  await mustRun(
    "radosgw-admin",
    "-c",
    conf,
    "user",
    "create",
    `--uid=${name}`,
    "--display-name=test",
    ...keys,
  );
  return { AWS_ACCESS_KEY_ID: `${name}-key`, AWS_SECRET_ACCESS_KEY: `${name}-secret` };
}

/** One that nobody has at the moment. */
function freePort(): Promise<number> {
  return new Promise((settle, reject) => {
    const server = createServer().on("error", reject);
    server.listen(0, "127.0.0.1", () => {
      const address = server.address();
      server.close(() => settle(address !== null && typeof address === "object" ? address.port : 0));
    });
  });
}
