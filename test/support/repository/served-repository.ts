// A server with two disks and an encrypted repository, and backups of the one into the other.
import { readdirSync } from "node:fs";
import { join } from "node:path";
import { expect } from "vitest";
import { cowcatcher } from "../cli.js";
import { makeDisk, noise } from "../disks.js";
import { type Backup, mustRun, scratchFolder, Server } from "../server.js";

const MiB = 2 ** 20;

export interface RepositoryResult {
  level: string;
  level_reason: string;
  t0: string;
  new_bytes: number;
  disks: { disk: string; bytes: number; read_bytes: number; new_chunks: number; captures: number }[];
}

export async function good(...args: string[]): Promise<string> {
  const { code, stdout, stderr } = await cowcatcher(args);
  expect([stderr, code]).toEqual(["", 0]);
  return stdout;
}

export class ServedRepository {
  readonly repo: string;
  readonly key: string[];

  private constructor(
    readonly folder: string,
    public server: Server,
  ) {
    this.repo = join(folder, "repo");
    this.key = ["--key-file", join(folder, "key")];
  }

  /** `root`, raw, of 8 MiB and a sector, and `data`, qcow2, of 12 MiB; chunks of 1 MiB. */
  static async start(): Promise<ServedRepository> {
    const folder = scratchFolder();
    const key = ["--key-file", join(folder, "key"), "--new-key-file"];
    await good("repo", "init", join(folder, "repo"), ...key, "--chunk-size", "1M");
    await makeDisk(join(folder, "root.raw"), noise(8 * MiB + 512));
    await makeDisk(join(folder, "data.qcow2"), noise(12 * MiB, 2));
    return new ServedRepository(folder, await serve(folder));
  }

  at(name: string): string {
    return join(this.folder, name);
  }

  async restart(): Promise<void> {
    this.server = await serve(this.folder);
  }

  backup(...args: string[]): Backup {
    return this.server.backup("--repo", this.repo, "--group", "vm", ...this.key, ...args);
  }

  async done(...args: string[]): Promise<RepositoryResult> {
    return (await this.backup(...args).succeed()) as unknown as RepositoryResult;
  }

  /** As the guest. */
  async write(disk: string, ...commands: string[]): Promise<void> {
    const given = commands.flatMap((command) => ["-c", command]);
    await mustRun("qemu-io", "-f", "raw", ...given, this.server.uri(disk));
  }

  /** The disk of the group is, byte for byte, what the image is. */
  async expectHolds(disk: string, image: string): Promise<void> {
    const address = `${this.repo}::vm/${disk}`;
    const { code, stdout, stderr } = await cowcatcher([
      "compare",
      "-U",
      this.at(image),
      address,
      ...this.key,
    ]);
    expect([code, stdout + stderr]).toEqual([0, expect.stringContaining("identical")]);
  }

  async times(): Promise<string[]> {
    const list = JSON.parse(await good("repo", "list", this.repo, "--json", ...this.key)) as { t0: string }[];
    return list.map(({ t0 }) => t0);
  }

  /** Records of who is at work. */
  get locks(): string[] {
    return readdirSync(join(this.repo, "locks"));
  }
}

function serve(folder: string): Promise<Server> {
  return Server.start(folder, [`${join(folder, "root.raw")}=root`, `${join(folder, "data.qcow2")}=data`]);
}
