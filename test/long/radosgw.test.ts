// A repository in a real S3 server: Debian's radosgw. The store's own suite, what a user does with a repository, a server
// that dies and comes back, and the server's words where it refuses.
import { randomBytes } from "node:crypto";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { describeS3 } from "../../src/repository/store/s3-address.js";
import { S3Store } from "../../src/repository/store/s3-store.js";
import { listNames } from "../../src/repository/store/store.js";
import { MiB } from "../../src/units.js";
import { cowcatcher, type RunResult } from "../support/cli.js";
import { hasRadosgw, Radosgw } from "../support/radosgw.js";
import { storeSuite } from "../support/repository/store-suite.js";
import { Backup, scratchFolder, stopAll } from "../support/server.js";

const NAMES_MAX = 100_000;

describe.skipIf(!hasRadosgw)("radosgw", () => {
  let gateway: Radosgw;
  let folder = "";
  let prefixes = 0;

  beforeAll(async () => {
    gateway = await Radosgw.start();
    folder = scratchFolder();
  });
  afterAll(stopAll);

  /** A place of its own in the bucket. */
  const place = (bucket = "backups"): string => `s3:${gateway.endpoint}/${bucket}/p${prefixes++}`;
  const at = (name: string): string => join(folder, name);
  const cli = (...args: string[]): Promise<RunResult> => cowcatcher(args, { env: { ...gateway.user } });
  const good = async (...args: string[]): Promise<string> => {
    const result = await cli(...args);
    expect(result, result.stderr).toMatchObject({ code: 0 });
    return result.stdout;
  };

  function makeDisk(name: string): Buffer {
    const content = Buffer.concat([randomBytes(20 * MiB), Buffer.alloc(13 * MiB + 5)]);
    content.write("text ".repeat(100_000), 25 * MiB);
    writeFileSync(at(name), content);
    return content;
  }

  describe("as a store", () =>
    storeSuite(() => {
      const description = describeS3(place(), { ...gateway.user });
      return Promise.resolve({
        store: new S3Store(description),
        other: new S3Store(description),
        end: () => Promise.resolve(),
      });
    }));

  it("keeps a repository: init, backup, forget, prune, verify, restore", async () => {
    const repo = place();
    const first = makeDisk("disk.img");
    writeFileSync(at("pass"), "a passphrase\n");
    const key = ["--passphrase-file", at("pass")];
    await good("repo", "init", repo, "--chunk-size", "1M", ...key);
    const backup = async (): Promise<{ new_bytes: number; t0: string }> => {
      const out = await good("backup", at("disk.img"), "--repo", repo, "--group", "vm+1", "--json", ...key);
      return JSON.parse(out.trim().split("\n").at(-1) ?? "") as { new_bytes: number; t0: string };
    };
    const { t0, new_bytes } = await backup();
    expect(new_bytes).toBeGreaterThan(20 * MiB);
    expect((await backup()).new_bytes).toBe(0);
    const second = makeDisk("disk.img");
    await backup();
    await good("restore", `${repo}::vm+1@${t0}`, at("first.img"), ...key);
    expect(readFileSync(at("first.img")).equals(first)).toBe(true);
    expect(await good("repo", "verify", repo, ...key)).toContain("no damage");
    const store = new S3Store(describeS3(repo, { ...gateway.user }));
    const before = (await listNames(store, "chunks/", NAMES_MAX)).length;
    await good("repo", "forget", `${repo}::vm+1`, "--keep-last", "1", ...key);
    await good("repo", "prune", repo, ...key);
    const after = (await listNames(store, "chunks/", NAMES_MAX)).length;
    // Twenty of random data went with the first disk; each has one of text and one that is cut.
    expect(before - after).toBe(20);
    expect(await good("repo", "verify", repo, ...key)).toContain("no damage");
    await good("restore", `${repo}::vm+1`, at("second.img"), ...key);
    expect(readFileSync(at("second.img")).equals(second)).toBe(true);
    const left = await listNames(store, "", NAMES_MAX);
    expect(left.filter((name) => /^(locks|claims)\//.test(name))).toEqual([]);
  });

  it("goes on with a backup through a server that is killed and comes back", async () => {
    const repo = place();
    const content = makeDisk("killed.img");
    await good("repo", "init", repo, "--chunk-size", "1M");
    const args = [at("killed.img"), "--repo", repo, "--group", "vm", "--rate-limit", "8M"];
    const running = new Backup(args, { ...gateway.user });
    await running.started();
    await gateway.kill();
    await gateway.serve();
    await running.succeed();
    await good("restore", `${repo}::vm`, at("out.img"));
    expect(readFileSync(at("out.img")).equals(content)).toBe(true);
    expect(await good("repo", "verify", repo)).toContain("no damage");
  });

  it("is understood where it refuses", async () => {
    const refused = async (address: string, environment: Record<string, string>): Promise<string> => {
      const { code, stderr } = await cowcatcher(["repo", "init", address], { env: environment });
      expect([code, stderr.trim().split("\n").length]).toEqual([1, 1]);
      return stderr;
    };
    const { user } = gateway;
    const stranger = await gateway.stranger();
    const messages = [
      await refused(place("no-such-bucket"), { ...user }),
      await refused(place(), { ...user, AWS_SECRET_ACCESS_KEY: "wrong" }),
      await refused(place(), { ...user, AWS_ACCESS_KEY_ID: "nobody" }),
      await refused(place(), { ...stranger }),
    ];
    expect(messages[0]).toContain("there is no bucket no-such-bucket");
    for (const message of messages.slice(1)) expect(message).toMatch(/access denied|secret key|access key/);
  });
});
