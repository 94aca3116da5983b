// One live backup whose storage dies at a chosen call (dead-storage.c), beside guests that must not notice, and what has
// to hold while it is dead and when it lives again. Each wait is for an event that must come while the storage is dead:
// no time is measured, and nothing sleeps for the storage.
import { execFileSync } from "node:child_process";
import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { makeDisk, noise } from "./disks.js";
import { RawQmp } from "./raw-qmp.js";
import {
  type Backup,
  type Guest,
  Guest as GuestProcess,
  leftovers,
  scratchFolder,
  Server,
  until,
} from "./server.js";

const MiB = 1024 * 1024;
let library: string | undefined;

/** Compiles the library once a process. */
function deadStorageLibrary(): string {
  if (library === undefined) {
    library = join(scratchFolder(tmpdir()), "dead-storage.so");
    const source = resolve(import.meta.dirname, "dead-storage.c");
    execFileSync("gcc", ["-shared", "-fPIC", "-O1", "-w", "-fno-builtin", "-o", library, source]);
  }
  return library;
}

/** A call to the target's side: its name, and which of that name's calls it is. */
export interface DeathAt {
  call: string;
  nth: number;
}

export interface Scenario {
  name: string;
  /** Further options of the backup. */
  args: readonly string[];
  /** Further options of `serve`. */
  serveArgs?: readonly string[];
  /** The target is there already. */
  replaces?: boolean;
  /** The guest writes all over the disk, so that captures spill. */
  spills?: boolean;
  /** The backup is cancelled half-way. */
  cancels?: boolean;
  /** The target cannot be written: its folder is full, by a limit on the size of files. */
  fails?: boolean;
}

/** A line of the library's log. */
export interface LoggedCall {
  thread: "main" | "other";
  call: string;
  path: string;
}

/** A server with two disks, one of which is backed up to storage of which everything is known. */
export class DeadStorage {
  readonly targets: string;
  readonly target: string;
  readonly #log: string;
  readonly #release: string;

  private constructor(
    readonly folder: string,
    readonly server: Server,
    readonly scenario: Scenario,
  ) {
    this.targets = join(folder, "targets");
    this.target = join(this.targets, "day1.qcow2");
    this.#log = join(folder, "calls.log");
    this.#release = join(folder, "release");
  }

  /**
   * libuv's pool has one thread, and the disks are open with O_DIRECT: a single call to the dead storage that went there
   * would stop the guests.
   */
  static async start(scenario: Scenario, death?: DeathAt): Promise<DeadStorage> {
    const folder = scratchFolder(tmpdir());
    mkdirSync(join(folder, "targets"));
    writeFileSync(join(folder, "calls.log"), "");
    if (scenario.replaces === true) writeFileSync(join(folder, "targets", "day1.qcow2"), "an older backup");
    const disk = await makeDisk(join(folder, "disk.raw"), noise(16 * MiB));
    const other = await makeDisk(join(folder, "other.raw"), noise(2 * MiB));
    const env: Record<string, string> = {
      LD_PRELOAD: deadStorageLibrary(),
      UV_THREADPOOL_SIZE: "1",
      DEAD_UNDER: join(folder, "targets"),
      DEAD_LOG: join(folder, "calls.log"),
      DEAD_RELEASE: join(folder, "release"),
      ...(death !== undefined && { DEAD_CALL: death.call, DEAD_NTH: String(death.nth) }),
    };
    const args = ["-f", "raw", "--direct", ...(scenario.serveArgs ?? [])];
    const server = await Server.start(folder, [`${disk}=disk`, `${other}=other`], { args, env });
    return new DeadStorage(folder, server, scenario);
  }

  /** Calls on the target's side so far. */
  calls(): LoggedCall[] {
    const lines = readFileSync(this.#log, "utf8").split("\n");
    return lines.flatMap((line) => {
      const [thread, call = "", ...path] = line.split(" ");
      return thread === "main" || thread === "other" ? [{ thread, call, path: path.join(" ") }] : [];
    });
  }

  get isDead(): boolean {
    return readFileSync(this.#log, "utf8").includes("\ndead ");
  }

  revive(): void {
    writeFileSync(this.#release, "");
  }

  async guests(): Promise<{ disk: Guest; other: Guest }> {
    const disk = await GuestProcess.start("paced", 1, [this.server.uri()]);
    const other = await GuestProcess.start("paced", 2, [this.server.uri("other")]);
    disk.run();
    other.run();
    return { disk, other };
  }

  backup(): Backup {
    const { args, replaces, spills } = this.scenario;
    return this.server.backup(
      ...["--disk", "disk", "-O", "qcow2", this.target, "--target-retries", "0"],
      // The guest is to fill the buffer before the backup has drained it.
      ...["--rate-limit", spills === true ? "64K" : "2M"],
      ...["--guest-timeout", "2s", "--workers", "2"],
      ...(replaces === true ? ["--force"] : []),
      ...(spills === true ? ["--cow-buffer-size", "2M"] : ["--cow-buffer-size", "32M"]),
      ...args,
    );
  }

  async qmp(): Promise<RawQmp> {
    return RawQmp.negotiated(this.server.control);
  }

  /** The backup's way to its end, or until the storage is dead. */
  async play(backup: Backup, guest: Guest): Promise<void> {
    const isOver = (): boolean => this.isDead || backup.process.over;
    const hasStarted = (): boolean => backup.process.lines.some((line) => line.includes('"started"'));
    await until("the backup starts", () => isOver() || hasStarted());
    if (isOver()) return;
    const wanted = (await guest.count()) + (this.scenario.spills === true ? 800 : 20);
    await until(
      "the guest has changed some of the disk",
      async () => isOver() || (await guest.count()) >= wanted,
    );
    if (isOver()) return;
    if (this.scenario.cancels === true) await this.server.jobs("cancel", await backup.jobId());
    else await this.server.jobs("set-speed", await backup.jobId(), "0");
    await until("the backup is over", isOver);
  }

  leftovers(): string[] {
    return leftovers(this.targets);
  }

  get hasTarget(): boolean {
    return existsSync(this.target);
  }
}

/** What `play` met, for whoever wants to know how long the guests waited, in milliseconds. */
export interface Survival {
  diskWaitMs: number;
  otherWaitMs: number;
}

/**
 * Plays the scenario until the storage dies at that call, and demands while it is dead: both guests go on, another job
 * runs to its end, the control socket answers, a cancel ends the job. When it lives again everything is cleaned up, and the
 * next backup succeeds. @throws Error naming what did not come about
 */
export async function survive(scenario: Scenario, death: DeathAt): Promise<Survival> {
  const storage = await DeadStorage.start(scenario, death);
  const { server } = storage;
  const { disk, other } = await storage.guests();
  const backup = storage.backup();
  await storage.play(backup, disk);
  if (!storage.isDead) {
    const { stderr } = await backup.end();
    throw new Error(`${scenario.name}: there was no ${death.call} ${death.nth}: ${stderr}`);
  }
  await Promise.all([disk.progress(20), other.progress(20)]);
  await server.backup("--disk", "other", "-O", "raw", join(storage.folder, "other-backup.raw")).succeed();
  await cancelAll(storage);
  await backup.end();
  await Promise.all([disk.progress(20), other.progress(20)]);

  storage.revive();
  await until("what the backup left is removed", () => storage.leftovers().length === 0);
  await until("the target is free, and the next backup succeeds", async () => {
    const { code, stderr } = await storage.server
      .backup("--disk", "disk", "-O", "qcow2", storage.target, "--force")
      .end();
    if (code !== 0 && !stderr.includes("writes there")) throw new Error(stderr);
    return code === 0;
  });
  const [{ longestMs: diskWaitMs }, { longestMs: otherWaitMs }] = [await disk.pause(), await other.pause()];
  await Promise.all([disk.quit(), other.quit()]);
  const { code, stderr } = await server.stop();
  if (code !== 0) throw new Error(`serve ended with ${code}: ${stderr}`);
  return { diskWaitMs, otherWaitMs };
}

async function cancelAll({ server }: DeadStorage): Promise<void> {
  const client = await RawQmp.negotiated(server.control);
  await until("the job is over", async () => {
    const { return: jobs } = await client.ask({ execute: "query-jobs" });
    const left = (jobs as { id: string; status: string }[]).filter(({ status }) => status !== "concluded");
    for (const { id } of left) await client.ask({ execute: "job-cancel", arguments: { id } });
    return left.length === 0;
  });
  client.close();
}
