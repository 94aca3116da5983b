// A QEMU with disks that a test writes to as a guest does, without an operating system in it: `qemu-io` of its human
// monitor writes through the device's own backend, so that whatever is put below the device is in the way. The writes follow
// each other and are kept, so that of any image it can be told which of them it holds. Or a storage daemon, whose guest is
// a client of its NBD server.
import { spawnSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { ControlClient } from "../../src/qmp/client.js";
import { isJsonObject, type JsonObject } from "../../src/qmp/protocol.js";
import { NbdClient } from "../../src/nbd/client/client.js";
import { Process, until } from "./server.js";

const SECTOR_BYTES = 512;
const WRITE_SECTORS = [1, 8, 16, 64, 128];

export interface QemuOptions {
  format?: "raw" | "qcow2";
  /** Of each disk; 8 MiB and a sector by default, so that the last cluster is cut. */
  sizeBytes?: number;
  diskCount?: number;
  iothread?: boolean;
  /** The processor runs (the firmware, for want of a system). */
  running?: boolean;
  /** `-drive` in place of `-blockdev`, with no node name. */
  isLegacy?: boolean;
  /** qemu-storage-daemon in the place of QEMU. */
  isDaemon?: boolean;
  /** The images of an earlier QEMU in this folder go on; `writes` does not. */
  keepsImages?: boolean;
  /** Of a qcow2 image: as `qemu-img create -o` has it. */
  imageOptions?: string;
  /** Somebody else has started it, with disks of these options. */
  foreign?: ForeignQemu;
}

/** A QEMU that the test has not started itself. */
export interface ForeignQemu {
  /** QMP socket for the test's own use. */
  ownMonitor: string;
  /** The file that its standard output goes to. */
  log: string;
  /** Path of each disk's device in the object tree. */
  qdevs: readonly string[];
}

interface Write {
  disk: number;
  offsetBytes: number;
  lengthBytes: number;
  pattern: number;
}

export class Qemu {
  /** For the program under test. */
  readonly monitor: string;
  readonly sizeBytes: number;
  readonly writes: Write[] = [];
  readonly #process: Process | undefined;
  readonly #foreign: ForeignQemu | undefined;
  readonly #folder: string;
  readonly #diskCount: number;
  #own: ControlClient | undefined;
  readonly #isDaemon: boolean;
  /** The guests of a daemon's disks. */
  readonly #guests: NbdClient[] = [];
  #seed = 1;
  #isWriting = false;
  #isStopped = false;
  #writing: Promise<void> = Promise.resolve();

  private constructor(folder: string, options: QemuOptions) {
    const { format = "raw", sizeBytes = 8 * 1024 * 1024 + SECTOR_BYTES, diskCount = 1 } = options;
    this.#folder = folder;
    this.sizeBytes = sizeBytes;
    this.#diskCount = diskCount;
    this.#isDaemon = options.isDaemon === true;
    this.monitor = join(folder, "qmp.sock");
    this.#foreign = options.foreign;
    if (options.foreign !== undefined) return;
    const disks = Array.from({ length: diskCount }, (_, i) => i);
    const more = options.imageOptions === undefined ? [] : ["-o", options.imageOptions];
    for (const disk of options.keepsImages === true ? [] : disks) {
      const image = ["-f", format, ...more, this.image(disk), String(sizeBytes)];
      const made = spawnSync("qemu-img", ["create", "-q", ...image]);
      if (made.status !== 0) throw new Error(String(made.stderr));
    }
    if (this.#isDaemon) {
      this.#process = new Process("qemu-storage-daemon", [
        ...[this.monitor, this.#ownMonitor].flatMap((path, i) => [
          ...["--chardev", `socket,path=${path},server=on,wait=off,id=c${i}`, "--monitor", `chardev=c${i}`],
        ]),
        ...disks.flatMap((disk) => blockdevArguments(disk, this.image(disk), format, "--")),
        ...["--nbd-server", `addr.type=unix,addr.path=${this.nbdSocket}`],
        ...disks.flatMap((disk) => [
          ...["--export", `nbd,id=guest${disk},node-name=drive${disk},name=guest${disk},writable=on`],
        ]),
      ]);
      return;
    }
    this.#process = new Process("qemu-system-x86_64", [
      ...["-nodefaults", "-machine", "q35", "-accel", "tcg", "-m", "64", "-display", "none", "-S"],
      ...[this.monitor, this.#ownMonitor].flatMap((path) => ["-qmp", `unix:${path},server=on,wait=off`]),
      ...(options.iothread === true ? ["-object", "iothread,id=io0"] : []),
      ...disks.flatMap((disk) => diskArguments(disk, this.image(disk), format, options)),
    ]);
  }

  static async start(folder: string, options: QemuOptions = {}): Promise<Qemu> {
    const qemu = new Qemu(folder, options);
    await until("QEMU's monitor answers", async () => {
      if (qemu.#process?.over === true) throw new Error(qemu.#process.stderr);
      qemu.#own = await ControlClient.connect(qemu.#ownMonitor).catch(() => undefined);
      return qemu.#own !== undefined;
    });
    // Events and answers of one monitor come in the order in which things were done.
    qemu.#own?.onEvent(({ event }) => {
      if (event === "STOP") qemu.#isStopped = true;
      if (event === "RESUME") qemu.#isStopped = false;
    });
    for (let disk = 0; qemu.#isDaemon && disk < qemu.#diskCount; disk++) {
      qemu.#guests.push(await NbdClient.connect(`nbd+unix:///guest${disk}?socket=${qemu.nbdSocket}`));
    }
    if (options.running === true) await qemu.execute("cont");
    return qemu;
  }

  /** Where the test has started it itself. */
  get process(): Process {
    if (this.#process === undefined) throw new Error("this QEMU is somebody else's process");
    return this.#process;
  }

  /** Of a daemon's own server. */
  get nbdSocket(): string {
    return join(this.#folder, "guests.sock");
  }

  get #ownMonitor(): string {
    return this.#foreign?.ownMonitor ?? join(this.#folder, "own.sock");
  }

  image(disk = 0): string {
    return join(this.#folder, `disk${disk}.img`);
  }

  /** In good order: persistent bitmaps are stored. */
  async quit(): Promise<void> {
    await this.execute("quit").catch(() => undefined);
    await this.process.end();
  }

  execute(command: string, args: JsonObject = {}): Promise<unknown> {
    if (this.#own === undefined) throw new Error("QEMU is not started");
    return this.#own.execute(command, args);
  }

  /** Returns when the guest's write is answered; its errors, if it has one, are on QEMU's standard output. */
  async write(offsetBytes: number, lengthBytes: number, pattern: number, disk = 0): Promise<void> {
    const guest = this.#guests[disk];
    if (guest !== undefined) {
      await guest.write(new Uint8Array(lengthBytes).fill(pattern), 0, lengthBytes, offsetBytes);
      this.writes.push({ disk, offsetBytes, lengthBytes, pattern });
      return;
    }
    const line = `qemu-io -d ${this.#foreign?.qdevs[disk] ?? qdevOf(disk)} "write -P ${pattern} ${offsetBytes} ${lengthBytes}"`;
    await this.execute("human-monitor-command", { "command-line": line });
    this.writes.push({ disk, offsetBytes, lengthBytes, pattern });
  }

  /** Fills all disks, each megabyte otherwise. */
  async fill(): Promise<void> {
    const unit = 1024 * 1024;
    for (let disk = 0; disk < this.#diskCount; disk++) {
      for (let at = 0; at < this.sizeBytes; at += unit) {
        await this.write(at, Math.min(unit, this.sizeBytes - at), 1 + ((at / unit + 7 * disk) % 250), disk);
      }
    }
  }

  /**
   * Writes on and on, at random places of all disks in turn. As a guest's processors it does not write while the machine is
   * stopped, but for one write that may be on its way then.
   */
  startWriting(): void {
    this.#isWriting = true;
    this.#writing = (async () => {
      while (this.#isWriting) {
        await until("the machine runs", () => !this.#isStopped);
        await this.writeSomewhere();
      }
    })();
    this.#writing.catch(() => undefined);
  }

  /** Dirty bitmaps of a disk, by QEMU's word. */
  async bitmaps(disk = 0): Promise<{ name: string; recording: boolean; persistent: boolean }[]> {
    const nodes = await this.#list("query-named-block-nodes", { flat: true });
    const found = nodes.find((node) => node["node-name"] === `drive${disk}`)?.["dirty-bitmaps"];
    return Array.isArray(found)
      ? found.filter(isJsonObject).map(({ name, recording, persistent }) => ({
          name: String(name),
          recording: recording === true,
          persistent: persistent === true,
        }))
      : [];
  }

  async writeSomewhere(): Promise<void> {
    const sectors = WRITE_SECTORS[this.#random(WRITE_SECTORS.length)] ?? 1;
    const offset = this.#random(Math.floor(this.sizeBytes / SECTOR_BYTES) - sectors + 1) * SECTOR_BYTES;
    const disk = this.writes.length % this.#diskCount;
    await this.write(offset, sectors * SECTOR_BYTES, 1 + this.#random(255), disk);
  }

  async progress(writeCount: number): Promise<void> {
    const wanted = this.writes.length + writeCount;
    await until("the guest goes on", () => this.writes.length >= wanted);
  }

  /** @throws Error when a write of the guest failed */
  async stopWriting(): Promise<void> {
    this.#isWriting = false;
    await this.#writing;
    this.expectNoGuestError();
  }

  expectNoGuestError(): void {
    const lines = this.#process?.lines ?? readFileSync(this.#foreign?.log ?? "", "utf8").split("\n");
    const failed = lines.find((line) => /write failed|error/i.test(line));
    if (failed !== undefined) throw new Error(`a guest write failed: ${failed}`);
  }

  /**
   * How many of the guest's writes the images hold, which must be the first of them in order: an instant.
   * @param earliest none before it is looked at
   * @returns -1: there is no such instant
   */
  instantOf(images: readonly string[], earliest: number, disks = images.map((_, i) => i)): number {
    const found = images.map((path) => readFileSync(path));
    const state = images.map(() => Buffer.alloc(this.sizeBytes));
    const apply = ({ disk, offsetBytes, lengthBytes, pattern }: Write): void => {
      state[disks.indexOf(disk)]?.fill(pattern, offsetBytes, offsetBytes + lengthBytes);
    };
    for (const [index, write] of this.writes.entries()) {
      apply(write);
      if (index + 1 < earliest) continue;
      const mine = disks.indexOf(write.disk);
      const { offsetBytes, lengthBytes } = write;
      const end = offsetBytes + lengthBytes;
      // Most moments are told apart by their last write.
      if (
        mine >= 0 &&
        found[mine]
          ?.subarray(offsetBytes, end)
          .equals(state[mine]?.subarray(offsetBytes, end) ?? Buffer.alloc(0)) !== true
      )
        continue;
      if (found.every((image, i) => image.equals(state[i] ?? Buffer.alloc(0)))) return index + 1;
    }
    return -1;
  }

  /** Names of what a backup could leave, and how things stand below the devices. */
  async state(): Promise<unknown> {
    const nodes = (await this.#list("query-named-block-nodes", { flat: true })).map(
      (node) => node["node-name"],
    );
    const blocks = this.#isDaemon ? [] : await this.#list("query-block");
    const roots = blocks.map(({ inserted }) => (isJsonObject(inserted) ? inserted["node-name"] : undefined));
    const exports = await this.#list("query-block-exports");
    const jobs = await this.#list("query-jobs");
    return {
      nodes: nodes.sort(),
      roots,
      exports: exports.map(({ id }) => id),
      jobs: jobs.map(({ id }) => id),
    };
  }

  async #list(command: string, args: JsonObject = {}): Promise<JsonObject[]> {
    const answer = await this.execute(command, args);
    return Array.isArray(answer) ? answer.filter(isJsonObject) : [];
  }

  /** A linear congruential generator: the same numbers each time (Numerical Recipes' constants). */
  #random(below: number): number {
    this.#seed = (Math.imul(this.#seed, 1664525) + 1013904223) >>> 0;
    return Math.floor((this.#seed / 2 ** 32) * below);
  }
}

function qdevOf(disk: number): string {
  return `/machine/peripheral/vd${disk}/virtio-backend`;
}

function diskArguments(
  disk: number,
  path: string,
  format: string,
  { iothread, isLegacy }: QemuOptions,
): string[] {
  const device = `virtio-blk-pci,drive=drive${disk},id=vd${disk}${iothread === true ? ",iothread=io0" : ""}`;
  if (isLegacy === true) {
    return ["-drive", `if=none,id=drive${disk},file=${path},format=${format}`, "-device", device];
  }
  return [...blockdevArguments(disk, path, format, "-"), "-device", device];
}

function blockdevArguments(disk: number, path: string, format: string, dashes: string): string[] {
  return [
    ...[`${dashes}blockdev`, `driver=file,node-name=file${disk},filename=${path}`],
    ...[`${dashes}blockdev`, `driver=${format},node-name=drive${disk},file=file${disk}`],
  ];
}
