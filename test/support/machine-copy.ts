// A copy of this machine to install packages in: an overlay whose upper part is in memory, and is thrown away. Wants root.
// What runs in it is in it by chroot, or, once it is booted, in a container with a systemd of its own.
import { spawnSync } from "node:child_process";
import { mkdirSync, mkdtempSync, readFileSync, rmdirSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { mustRun, Process, until } from "./server.js";

const BOOT_MS = 120_000;

export const canCopyMachine = process.getuid?.() === 0;
export const canBootCopy =
  canCopyMachine && spawnSync("systemd-nspawn", ["--version"], { stdio: "ignore" }).status === 0;

export class MachineCopy {
  readonly root: string;
  readonly #layers: string;
  #container: Process | undefined;
  #leader: number | undefined;

  private constructor(layers: string) {
    this.#layers = layers;
    this.root = join(layers, "root");
  }

  static async make(): Promise<MachineCopy> {
    const copy = new MachineCopy(mkdtempSync(join(tmpdir(), "cowcatcher-root-")));
    const layer = (name: string): string => join(copy.#layers, name);
    try {
      // A file system of its own, in which devices are devices.
      await mustRun("mount", "-t", "tmpfs", "none", copy.#layers);
      for (const name of ["up", "work", "root"]) mkdirSync(layer(name));
      const places = `lowerdir=/,upperdir=${layer("up")},workdir=${layer("work")}`;
      await mustRun("mount", "-t", "overlay", "overlay", "-o", places, copy.root);
      return copy;
    } catch (error) {
      copy.remove();
      throw error;
    }
  }

  /** With what a program expects that is run by chroot. */
  async prepare(): Promise<void> {
    await mustRun("mount", "-t", "proc", "proc", join(this.root, "proc"));
    for (const [name, minor] of [
      ["null", "3"],
      ["zero", "5"],
      ["urandom", "9"],
    ] as const) {
      // Some are there.
      spawnSync("mknod", ["-m", "666", join(this.root, "dev", name), "c", "1", minor]);
    }
  }

  /** Returns when its systemd has started what belongs to any system; nothing of this machine's services is. */
  async boot(): Promise<void> {
    writeFileSync(join(this.root, "etc/machine-id"), "");
    const container = new Process("systemd-nspawn", [
      ...["--quiet", "-D", this.root, `--machine=${basename(this.#layers)}`, "--register=no", "--keep-unit"],
      ...["--console=pipe", "--capability=all", "--boot", "systemd.unit=basic.target"],
    ]);
    this.#container = container;
    const children = `/proc/${container.pid}/task/${container.pid}/children`;
    const isUp = (): boolean => {
      if (container.over) throw new Error(container.stderr);
      // At first it is a process that makes the container's spaces.
      this.#leader = Number(readFileSync(children, "latin1").trim().split(" ").at(-1)) || undefined;
      if (this.#leader === undefined) return false;
      const [program, args] = this.#words(["systemctl", "is-active", "basic.target"]);
      return spawnSync(program, args, { encoding: "utf8" }).stdout === "active\n";
    };
    await until("the copy's systemd", isUp, BOOT_MS);
  }

  #words(command: readonly string[]): [string, string[]] {
    const leader = this.#leader;
    if (leader === undefined) return ["chroot", [this.root, ...command]];
    const spaces = ["-t", String(leader), "-m", "-u", "-i", "-p", "-n", "-C", `--root=/proc/${leader}/root`];
    return ["nsenter", [...spaces, "sh", "-c", 'cd / && exec "$@"', "sh", ...command]];
  }

  /** Runs a program in it that must succeed; its output. */
  inside(...command: string[]): Promise<string> {
    const [program, args] = this.#words(command);
    return mustRun(program, ...args);
  }

  start(...command: string[]): Process {
    return new Process(...this.#words(command));
  }

  write(path: string, text: string, mode = 0o600): void {
    writeFileSync(join(this.root, path), text, { mode });
  }

  async end(): Promise<void> {
    // With its first process the whole container ends, and nspawn after it.
    if (this.#leader !== undefined) spawnSync("kill", ["-9", String(this.#leader)]);
    await this.#container?.end();
    this.remove();
  }

  remove(): void {
    for (const place of [join(this.root, "proc"), this.root, this.#layers])
      spawnSync("umount", ["-l", place]);
    // Empty, or not ours to remove.
    rmdirSync(this.#layers);
  }
}
