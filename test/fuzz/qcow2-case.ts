// One mutant through every operation that reads or writes an image, in this process. What may come of each is a
// result or a CowcatcherError that a user can read; all else is a finding: another kind of error, an error of ours
// inside one (INTERNAL), a descriptor that stays open, a file touched that the operation has no business with, the
// two readers disagreeing with each other or with QEMU, a guest write that reached the image's header.

import { spawnSync } from "node:child_process";
import * as fs from "node:fs";
import * as path from "node:path";
import pino from "pino";
import type { CommandContext } from "../../src/cli/output/context.js";
import { runInfo } from "../../src/cli/actions/info.js";
import { mergedEntries } from "../../src/cli/actions/map.js";
import { CowcatcherError } from "../../src/errors.js";
import type { Image, SourceReader } from "../../src/block/device.js";
import { openImage } from "../../src/image/open.js";
import { checkImage } from "../../src/image/qcow2/check/check.js";
import { openSource } from "../../src/image/reader.js";
import { KiB, MiB } from "../../src/units.js";
import type { Random } from "../support/random.js";
import { takeTouches, type Touch } from "./sandbox.js";

export const MUTANT_NAME = "mutant.qcow2";
const COPY_NAME = "copy.qcow2";
/** Of a disk that claims to be huge only this much is read at its start, and a little at its end. */
const READ_BYTES = 8 * MiB;
const READ_STEP_BYTES = 512 * KiB;
const MAX_MAP_ENTRIES = 4000;
const GUEST_OPERATIONS = 24;
/** Of one operation on an image of a few MiB, which takes milliseconds: what grows with a number in the image is far above. */
const CPU_LIMIT_SECONDS = 15;

export interface CaseResult {
  findings: string[];
  /** What QEMU reads and we refuse, with the reason: no finding, but of interest. */
  refusals: string[];
  /** Steps that succeeded. */
  succeeded: number;
  comparedWithQemu: boolean;
}

type Outcome<T> = { value: T } | { error: CowcatcherError } | undefined;

export class MutantCase {
  private readonly result: CaseResult = { findings: [], refusals: [], succeeded: 0, comparedWithQemu: false };
  private readonly mutantPath: string;
  private readonly copyPath: string;

  constructor(
    private readonly folder: string,
    private readonly root: string,
    private readonly random: Random,
    /** Writes the mutant to a path. Not a copy of its file: that would fill the holes of a stretched one. */
    private readonly make: (path: string) => void,
  ) {
    this.mutantPath = path.join(folder, MUTANT_NAME);
    this.copyPath = path.join(folder, COPY_NAME);
  }

  /** `namesFile`: the image carries a name of the fuzzer's own, so it may lead out of the sandbox. */
  async run(namesFile: boolean, asksQemu: boolean): Promise<CaseResult> {
    this.make(this.mutantPath);
    const descriptorsBefore = openDescriptors();
    takeTouches();
    await this.step(
      "info",
      () => this.info(false),
      (touch) => touch.what === this.mutantPath && !touch.writes,
    );
    const mayTouch = (touch: Touch): boolean =>
      !touch.writes &&
      (namesFile || touch.what.startsWith(this.root) || touch.what.startsWith("/proc/self/fd/"));
    await this.step("info --backing-chain", () => this.info(true), mayTouch);
    await this.step("check", () => checkImage(this.mutantPath, { format: "qcow2" }), mayTouch);
    await this.step("map", () => this.map(), mayTouch);
    const read = await this.step("read", () => this.read(), mayTouch);
    const workerRead = await this.step("worker's read", () => this.readAsWorker(), mayTouch);
    this.compareReaders(read, workerRead);
    await this.step("snapshot", () => this.readSnapshot(), mayTouch);
    if (asksQemu) this.compareWithQemu(read);
    this.make(this.copyPath);
    // Before the writes, and of the copy: the mutant itself may be what the copy names as its data file.
    const before = identityOf(this.copyPath);
    takeTouches();
    await this.step(
      "guest writes",
      () => this.writeAsGuest(),
      (touch) => mayTouch({ ...touch, writes: false }),
    );
    await this.step("check after writes", () => checkImage(this.copyPath, { format: "qcow2" }), mayTouch);
    this.compareHeaders(before);
    fs.rmSync(this.copyPath);
    const left = openDescriptors() - descriptorsBefore;
    if (left > 0) this.find(`${left} descriptors stay open`);
    return this.result;
  }

  private find(what: string): void {
    this.result.findings.push(what);
  }

  private async step<T>(
    name: string,
    action: () => Promise<T>,
    mayTouch: (touch: Touch) => boolean,
  ): Promise<Outcome<T>> {
    let outcome: Outcome<T>;
    const cpuBefore = process.cpuUsage();
    try {
      outcome = { value: await action() };
      this.result.succeeded++;
    } catch (error) {
      outcome = this.judge(name, error);
    }
    const { user, system } = process.cpuUsage(cpuBefore);
    const seconds = (user + system) / 1e6;
    if (seconds > CPU_LIMIT_SECONDS) this.find(`${name} takes ${seconds} s of CPU time`);
    for (const touch of takeTouches()) {
      if (!mayTouch(touch)) this.find(`${name} opens ${touch.what}${touch.writes ? " for writing" : ""}`);
    }
    return outcome;
  }

  private judge(step: string, error: unknown): Outcome<never> {
    if (!(error instanceof CowcatcherError)) {
      this.find(`${step}: ${error instanceof Error ? (error.stack ?? error.message) : String(error)}`);
      return undefined;
    }
    if (error.code === "INTERNAL" || error.code === "WORKER") {
      const cause = error.cause instanceof Error ? error.cause.stack : "";
      this.find(`${step}: ${error.code} ${error.message}\n${cause}`);
    }
    return { error };
  }

  private async info(chain: boolean): Promise<void> {
    let text = "";
    const sink = { write: (more: string) => (text += more) };
    const output = { json: true, quiet: false, progress: undefined, stdout: sink, stderr: sink };
    const context: CommandContext = {
      command: "info",
      logger: pino({ level: "silent" }),
      reopenLog: () => undefined,
      output,
      interruptedBy: undefined,
    };
    await runInfo(this.mutantPath, { format: "qcow2", backingChain: chain }, context);
    JSON.parse(text);
  }

  private async withImage<T>(use: (image: Image) => Promise<T>, snapshot?: string): Promise<T> {
    const image = await openImage(this.mutantPath, { format: "qcow2", readOnly: true, snapshot });
    try {
      return await use(image);
    } finally {
      await image.close();
    }
  }

  private map(): Promise<void> {
    return this.withImage(async (image) => {
      let at = 0;
      let count = 0;
      for await (const entry of mergedEntries(image, 0, image.sizeBytes)) {
        if (entry.start !== at || entry.length <= 0)
          this.find(`map: entry at ${entry.start} instead of ${at}`);
        at += entry.length;
        if (++count >= MAX_MAP_ENTRIES) return;
      }
      if (at !== image.sizeBytes) this.find(`map ends at ${at} of ${image.sizeBytes}`);
    });
  }

  /** The first internal snapshot, where there is one. */
  private readSnapshot(): Promise<Buffer> {
    return this.withImage(readDevice, "1");
  }

  private read(): Promise<Buffer> {
    return this.withImage(readDevice);
  }

  private readAsWorker(): Promise<Buffer> {
    return this.withImage(async (image) => {
      const frozen = image.freeze();
      const reader = openSource(frozen.description);
      try {
        return await readSource(reader, (problem) => this.find(`worker's read: ${problem}`));
      } finally {
        reader.close();
        frozen.release();
      }
    });
  }

  private compareReaders(read: Outcome<Buffer>, workerRead: Outcome<Buffer>): void {
    if (read === undefined || workerRead === undefined) return;
    if ("value" in read && "value" in workerRead) {
      if (!read.value.equals(workerRead.value)) {
        this.find(`the readers disagree from byte ${firstDifference(read.value, workerRead.value)} on`);
      }
    } else if ("error" in workerRead && "value" in read) {
      this.find(`only the worker's reader fails: ${workerRead.error.message}`);
    } else if ("error" in read && "value" in workerRead) {
      this.find(`only the device's read fails: ${read.error.message}`);
    }
  }

  /** Where both can read it, QEMU sees the same bytes. */
  private compareWithQemu(read: Outcome<Buffer>): void {
    if (read === undefined) return;
    if ("value" in read && read.value.length >= READ_BYTES) return;
    const copy = path.join(this.folder, "qemu.raw");
    const args = ["-k", "1", "5", "qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", MUTANT_NAME, copy];
    const file = { maxFileBytes: 64 * MiB };
    const limited = ["--fsize=" + String(file.maxFileBytes), "timeout", ...args];
    const { status } = spawnSync("prlimit", limited, { cwd: this.folder, stdio: "ignore" });
    this.result.comparedWithQemu = true;
    if (status === 0) {
      const theirs = fs.readFileSync(copy);
      if ("error" in read) this.result.refusals.push(`${read.error.code} ${read.error.problem}`);
      else {
        // QEMU counts disks in whole sectors.
        const same = firstDifference(read.value, theirs);
        if (same < read.value.length - (read.value.length % 512))
          this.find(`QEMU reads other bytes from ${same} on`);
      }
    }
    fs.rmSync(copy, { force: true });
  }

  private async writeAsGuest(): Promise<void> {
    const { random } = this;
    const image = await openImage(this.copyPath, { format: "qcow2", readOnly: false });
    try {
      if (image.sizeBytes === 0) return;
      const buffer = Buffer.alloc(200 * KiB, 0x77);
      for (let count = 0; count < GUEST_OPERATIONS; count++) {
        const span = Math.min(image.sizeBytes, random.chance(0.8) ? 2 * MiB : 2 ** 50);
        const at = Math.floor(random.next() * span);
        const length = Math.min(
          image.sizeBytes - at,
          1 + random.below(random.chance(0.2) ? buffer.length : 5000),
        );
        try {
          await this.actAsGuest(image, buffer, at, length);
        } catch (error) {
          this.judge("guest write", error);
        }
      }
    } finally {
      await image.close();
    }
  }

  private async actAsGuest(image: Image, buffer: Buffer, at: number, length: number): Promise<void> {
    const roll = this.random.below(10);
    if (roll < 5) await image.write(buffer, 0, length, at);
    else if (roll < 6) await image.writeZeroes(at, length, { mayUnmap: this.random.chance(0.5) });
    else if (roll < 7) await image.discard(at, length);
    else if (roll < 9) await image.read(buffer, 0, length, at);
    else await image.flush();
  }

  /** A guest may not change what the header says of the disk, whatever the tables claim. */
  private compareHeaders(before: Buffer): void {
    if (!before.equals(identityOf(this.copyPath))) this.find("guest writes changed the header");
  }
}

async function readDevice(image: Image): Promise<Buffer> {
  const content = Buffer.alloc(Math.min(image.sizeBytes, READ_BYTES), 0xee);
  for (let at = 0; at < content.length; at += READ_STEP_BYTES) {
    await image.read(content, at, Math.min(READ_STEP_BYTES, content.length - at), at);
  }
  const tail = Buffer.alloc(Math.min(4 * KiB, image.sizeBytes));
  await image.read(tail, 0, tail.length, image.sizeBytes - tail.length);
  return content;
}

/** The first 36 bytes of the header: magic, version, backing name's place, geometry, size, encryption. */
function identityOf(imagePath: string): Buffer {
  const fd = fs.openSync(imagePath, "r");
  const bytes = Buffer.alloc(36);
  fs.readSync(fd, bytes, 0, bytes.length, 0);
  fs.closeSync(fd);
  takeTouches();
  return bytes;
}

/** As a worker reads: what is not zero by metadata, in steps. */
async function readSource(reader: SourceReader, complain: (problem: string) => void): Promise<Buffer> {
  const content = Buffer.alloc(Math.min(reader.sizeBytes, READ_BYTES), 0xee);
  for (let at = 0; at < content.length;) {
    const extent = reader.extent(at, content.length - at);
    if (extent.lengthBytes <= 0 || extent.lengthBytes > content.length - at) {
      complain(`extent of ${extent.lengthBytes} bytes at ${at}`);
      break;
    }
    const length = Math.min(extent.lengthBytes, READ_STEP_BYTES);
    if (extent.zero) content.fill(0, at, at + length);
    else await reader.read(content, at, length, at);
    at += length;
  }
  const tail = Buffer.alloc(Math.min(4 * KiB, reader.sizeBytes));
  await reader.read(tail, 0, tail.length, reader.sizeBytes - tail.length);
  return content;
}

function firstDifference(a: Buffer, b: Buffer): number {
  const length = Math.min(a.length, b.length);
  for (let index = 0; index < length; index++) if (a[index] !== b[index]) return index;
  return length;
}

function openDescriptors(): number {
  const count = fs.readdirSync("/proc/self/fd").length;
  takeTouches();
  return count;
}
