// The process that runs mutants: `qcow2-child.js ROOT SEED FIRST SECONDS`. It tells its parent on its standard
// output, a JSON line each, when a case begins and what came of it, and may be killed at any moment.

import "./watch.js";
import {
  copyFileSync,
  closeSync,
  ftruncateSync,
  openSync,
  readFileSync,
  readdirSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { join } from "node:path";
import { MiB } from "../../src/units.js";
import { IMAGE_NAME } from "../support/qcow2-shapes.js";
import { Random } from "../support/random.js";
import { MUTANT_NAME, MutantCase } from "./qcow2-case.js";
import { type Layout, layoutOf } from "./qcow2-layout.js";
import { type Mutant, mutate } from "./qcow2-mutations.js";
import { hostileNames, takeTouches } from "./sandbox.js";

/** Beside the process itself: the tables of one image at their limits, the caches, and the garbage of a case. */
const MEMORY_LIMIT_BYTES = 640 * MiB;
/** Asking QEMU costs as much as some ten cases. */
const QEMU_SHARE = 0.12;

export interface CaseReport {
  case: number;
  seedImage: string;
  notes: string[];
  findings?: string[];
  refusals?: string[];
  succeeded?: number;
  comparedWithQemu?: boolean;
}

interface Seed {
  name: string;
  bytes: Buffer;
  layout: Layout;
}

function tell(report: CaseReport): void {
  writeSync(1, `${JSON.stringify(report)}\n`);
}

function loadSeeds(root: string): Seed[] {
  return readdirSync(root)
    .filter((name) => name !== "lib")
    .sort()
    .map((name) => {
      const bytes = readFileSync(join(root, name, IMAGE_NAME));
      return { name, bytes, layout: layoutOf(bytes) };
    });
}

function writeMutant(seedPath: string, mutantPath: string, { patches, fileBytes }: Mutant): void {
  copyFileSync(seedPath, mutantPath);
  const fd = openSync(mutantPath, "r+");
  for (const { offset, bytes } of patches) writeSync(fd, bytes, 0, bytes.length, offset);
  if (fileBytes !== undefined) ftruncateSync(fd, fileBytes);
  closeSync(fd);
}

/** The largest the process has been since the last call, in bytes. */
function takePeakBytes(): number {
  const peakKiB = /VmHWM:\s*(\d+)/.exec(readFileSync("/proc/self/status", "utf8"))?.[1];
  writeFileSync("/proc/self/clear_refs", "5");
  return Number(peakKiB ?? 0) * 1024;
}

/** An image as QEMU made it: what the first operations of a process open for good is open then. */
async function warmUp(root: string, [seed]: readonly Seed[]): Promise<void> {
  if (seed === undefined) throw new Error("there are no seeds");
  const folder = join(root, seed.name);
  const make = (target: string): void => copyFileSync(join(folder, IMAGE_NAME), target);
  await new MutantCase(folder, root, new Random(1), make).run(false, false);
}

async function runCase(
  root: string,
  seeds: readonly Seed[],
  masterSeed: number,
  index: number,
): Promise<void> {
  const random = new Random(masterSeed * 1_000_003 + index);
  const seed = random.pick(seeds);
  const folder = join(root, seed.name);
  const mutant = mutate(seed.bytes, seed.layout, hostileNames(root, MUTANT_NAME), random);
  const base = { case: index, seedImage: seed.name, notes: mutant.notes };
  tell(base);
  takePeakBytes();
  const namesFile = mutant.notes.some((note) => /backing|extension 0x44415441|bits|copy|header/.test(note));
  const make = (target: string): void => writeMutant(join(folder, IMAGE_NAME), target, mutant);
  const mutantCase = new MutantCase(folder, root, random, make);
  const result = await mutantCase.run(namesFile, random.chance(QEMU_SHARE));
  const findings = [...result.findings];
  const peak = takePeakBytes();
  takeTouches();
  if (peak > MEMORY_LIMIT_BYTES) findings.push(`took ${Math.round(peak / MiB)} MiB of memory`);
  tell({ ...base, ...result, findings });
}

const [root = "", masterSeed = "", first = "", seconds = "", count = "Infinity"] = process.argv.slice(2);
let current = Number(first);
const failCase = (error: unknown): void => {
  const what = error instanceof Error ? (error.stack ?? error.message) : String(error);
  tell({ case: current, seedImage: "", notes: [], findings: [`uncaught: ${what}`] });
  process.exit(1);
};
process.on("uncaughtException", failCase);
process.on("unhandledRejection", failCase);
const seeds = loadSeeds(root);
await warmUp(root, seeds);
const end = performance.now() + Number(seconds) * 1000;
for (; performance.now() < end && current < Number(first) + Number(count); current++) {
  await runCase(root, seeds, Number(masterSeed), current);
}
