// npm run demo: a live backup of a disk that a guest is writing to, and the proof that it is the disk as of T0.
//
// The guest pauses for a moment so that the demo can take an ordinary copy of the disk to compare with; the pause
// ends as soon as the server says that the backup has started. cowcatcher itself needs no pause.

import { closeSync, copyFileSync, constants, openSync, readSync, statfsSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { ControlClient } from "../src/qmp/client.js";
import { CowcatcherError } from "../src/errors.js";
import { NbdClient } from "../src/nbd/client/client.js";
import { MiB, formatBytes, formatDuration } from "../src/units.js";
import { childError, runMain, runProgram, say, scratchFolder, sleep } from "./lib/children.js";
import { COWCATCHER_BIN, startCowcatcher, startServe } from "./lib/cowcatcher.js";
import { makeDemoDisk } from "./lib/demo-disk.js";
import { GUEST_BLOCK_BYTES, SteadyGuest, type GuestPhase } from "./lib/steady-guest.js";

const DISK_BYTES = 512 * MiB;
const RATE_LIMIT = "30M";
const WRITES_PER_SECOND = 1000;
const GUEST_ALONE_MS = 3000;
/** Disk, copy and backup, and a spill that this demo does not need. */
const FREE_BYTES_NEEDED = 4 * DISK_BYTES;
const DEADLINE_MS = 180_000;

let stepCount = 0;

function step(title: string): void {
  stepCount++;
  say();
  say(`${stepCount}. ${title}`);
}

function detail(text: string): void {
  say(`   ${text}`);
}

async function demo(): Promise<number> {
  checkSpace();
  const startMs = performance.now();
  const folder = scratchFolder();
  const path = (name: string): string => join(folder, name);
  const [disk, copy, backup] = [path("disk.raw"), path("copy-of-t0.raw"), path("backup.qcow2")];
  const [socket, control] = [path("nbd.sock"), path("control.sock")];

  step("Make a disk");
  const made = makeDemoDisk(disk, DISK_BYTES);
  const emptyBytes = DISK_BYTES - made.fileBytes - made.randomBytes;
  detail(
    `${formatBytes(DISK_BYTES)}: ${formatBytes(made.fileBytes)} of files from ${made.sourceFolder}, ` +
      `${formatBytes(made.randomBytes)} of random data, ${formatBytes(emptyBytes)} empty`,
  );

  step("Serve it to a guest over NBD");
  detail("$ cowcatcher serve disk.raw --socket nbd.sock --control control.sock");
  const serveStartMs = performance.now();
  const server = await startServe({ image: disk, format: "raw", socket, control });
  detail(`ready after ${formatDuration(performance.now() - serveStartMs)}`);

  step("A guest writes to it");
  const client = await NbdClient.connect({ path: socket, exportName: "disk" }, { maxInFlight: 32 });
  const guest = new SteadyGuest(client, WRITES_PER_SECOND);
  const blockText = formatBytes(GUEST_BLOCK_BYTES);
  detail(`${WRITES_PER_SECOND} random writes of ${blockText} a second, ${GUEST_ALONE_MS / 1000} s so far`);
  guest.resume();
  await sleep(GUEST_ALONE_MS);

  step("Back the disk up while the guest goes on writing");
  const before = await guest.pause();
  // The server has written what it acknowledged to the file, so a plain copy of the file shows it.
  copyFileSync(disk, copy, constants.COPYFILE_FICLONE);
  detail("the guest held its breath while this demo took a copy to compare with");
  detail(`$ cowcatcher backup --control control.sock backup.qcow2 --rate-limit ${RATE_LIMIT}`);
  await backUp(control, backup, guest);
  const during = await guest.pause();

  step("Prove it");
  await client.disconnect();
  const stopped = await server.stop();
  if (stopped.code !== 0) throw childError(server, `exit code ${stopped.code}`);
  await proveBackup(copy, backup);
  proveDisk(guest, disk, copy);

  step("What the guest noticed");
  printPhases(before, during);
  say();
  say(`Done in ${formatDuration(performance.now() - startMs)}. The demo's files are removed.`);
  return 0;
}

/** Runs the backup to its end; the guest resumes at T0. */
async function backUp(control: string, target: string, guest: SteadyGuest): Promise<void> {
  const watcher = await ControlClient.connect(control);
  let isStarted = false;
  watcher.onEvent(({ event, data }) => {
    if (isStarted || event !== "JOB_STATUS_CHANGE" || data["status"] !== "running") return;
    isStarted = true;
    guest.resume();
  });
  try {
    // Bars on a terminal; -p asks for plain lines elsewhere.
    const progress = process.stderr.isTTY ? [] : ["-p"];
    const args = ["backup", "--control", control, target, "--rate-limit", RATE_LIMIT, ...progress];
    const child = startCowcatcher(args, { stdio: ["ignore", "pipe", "inherit"] });
    const { code, stdout } = await child.ended;
    if (code !== 0) throw childError(child, `exit code ${code}`);
    if (!isStarted) throw childError(child, "ended, but the server never said that it had started");
    for (const line of stdout.trimEnd().split("\n")) detail(line.replaceAll(target, "backup.qcow2"));
  } finally {
    watcher.close();
  }
}

async function proveBackup(copy: string, backup: string): Promise<void> {
  const run = await runProgram(process.execPath, [COWCATCHER_BIN, "check", backup]);
  detail(`$ cowcatcher check backup.qcow2\n   ${run.stdout.trim().split("\n")[0] ?? ""}`);
  const compared = startCowcatcher(["compare", copy, backup]);
  const { code, stdout } = await compared.ended;
  if (code === 1) throw different("backup.qcow2", `is not the disk as of T0: ${stdout.trim()}`);
  if (code !== 0) throw childError(compared, `exit code ${code}`);
  detail(`$ cowcatcher compare copy-of-t0.raw backup.qcow2\n   ${stdout.trim()}`);
}

function proveDisk(guest: SteadyGuest, disk: string, copy: string): void {
  const live = new BlockReader(disk);
  const original = new BlockReader(copy);
  try {
    const offset = guest.firstDifference(
      (block) => live.read(block),
      (block) => original.read(block),
    );
    if (offset !== undefined) throw different("disk.raw", "is not what the guest wrote", offset);
    detail(`the disk holds what the guest wrote, in all ${guest.blocksWritten} blocks that it wrote to`);
  } finally {
    live.close();
    original.close();
  }
}

class BlockReader {
  readonly #fd: number;
  readonly #buffer = Buffer.alloc(GUEST_BLOCK_BYTES);

  constructor(path: string) {
    this.#fd = openSync(path, "r");
  }

  /** Valid until the next call. */
  read(block: number): Buffer {
    const byteCount = readSync(this.#fd, this.#buffer, 0, GUEST_BLOCK_BYTES, block * GUEST_BLOCK_BYTES);
    return this.#buffer.subarray(0, byteCount);
  }

  close(): void {
    closeSync(this.#fd);
  }
}

function printPhases(before: GuestPhase, during: GuestPhase): void {
  const milliseconds = (value: number): string => `${value.toFixed(2)} ms`.padStart(11);
  const line = (name: string, { writeCount, seconds, latencies }: GuestPhase): string => {
    const rate = Math.round(writeCount / seconds).toString();
    const at = (fraction: number): number =>
      latencies[Math.min(latencies.length - 1, Math.floor(latencies.length * fraction))] ?? 0;
    return `${name.padEnd(20)}${rate.padStart(9)}${milliseconds(at(0.5))}${milliseconds(at(0.99))}${milliseconds(at(1))}`;
  };
  detail(
    `${"".padEnd(20)}${"writes/s".padStart(9)}${["median", "p99", "longest"].map((name) => name.padStart(11)).join("")}`,
  );
  detail(line("before the backup", before));
  detail(line("during the backup", during));
}

function checkSpace(): void {
  const { bavail, bsize } = statfsSync(tmpdir());
  if (bavail * bsize >= FREE_BYTES_NEEDED) return;
  throw new CowcatcherError({
    code: "NO_SPACE",
    object: tmpdir(),
    problem: `the demo needs ${formatBytes(FREE_BYTES_NEEDED)} of free space`,
    hint: "set TMPDIR to a folder on another disk",
  });
}

function different(object: string, problem: string, offsetBytes?: number): CowcatcherError {
  return new CowcatcherError({ code: "IO", object, problem, offsetBytes });
}

/** Rejects when the demo hangs, which it must not do in front of a newcomer. */
function deadline(): Promise<never> {
  return new Promise((_, reject) => {
    const problem = `not done within ${formatDuration(DEADLINE_MS)}`;
    setTimeout(
      () => reject(new CowcatcherError({ code: "LIMIT", object: "demo", problem })),
      DEADLINE_MS,
    ).unref();
  });
}

say("cowcatcher: a live backup that the guest hardly notices");
await runMain("demo", () => Promise.race([demo(), deadline()]));
