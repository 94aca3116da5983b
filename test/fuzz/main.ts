// npm run fuzz -- [--seed N] [--seconds S] [--only qcow2|nbd|nbd-client] [--case K]
//
// Attacks the parsers of what others made: images (qcow2.ts), NBD clients and NBD servers. Seeded: a finding is printed
// with the command that shows it again. Exit code 1 with findings, and a last line for scripts.

import { parseArgs } from "node:util";
import { fuzzNbdClient } from "./nbd-client-stream.js";
import { fuzzNbdServer } from "./nbd-stream.js";
import { fuzzQcow2 } from "./qcow2.js";

export interface FuzzOptions {
  seed: number;
  seconds: number;
  /** This case alone. */
  firstCase: number | undefined;
}

export interface FuzzSummary {
  name: string;
  cases: number;
  /** Each with what shows it again. */
  findings: string[];
  notes: string[];
}

type Fuzzer = (options: FuzzOptions) => Promise<FuzzSummary>;

const FUZZERS: Record<string, Fuzzer> = {
  qcow2: fuzzQcow2,
  nbd: fuzzNbdServer,
  "nbd-client": fuzzNbdClient,
};

const { values } = parseArgs({
  options: {
    seed: { type: "string" },
    seconds: { type: "string", default: "60" },
    only: { type: "string" },
    case: { type: "string" },
  },
});

function wholeNumber(name: string, text: string): number {
  if (!/^\d+$/.test(text) || !Number.isSafeInteger(Number(text))) {
    console.error(`fuzz: --${name} wants a whole number, not '${text}'`);
    process.exit(2);
  }
  return Number(text);
}

const names = values.only === undefined ? Object.keys(FUZZERS) : [values.only];
const seed = values.seed === undefined ? Math.floor(Math.random() * 1e6) : wholeNumber("seed", values.seed);
const seconds = wholeNumber("seconds", values.seconds) / names.length;
const firstCase = values.case === undefined ? undefined : wholeNumber("case", values.case);

console.log(`fuzz: --seed ${seed} --seconds ${values.seconds}`);
let cases = 0;
let findingCount = 0;
for (const name of names) {
  const fuzzer = FUZZERS[name];
  if (fuzzer === undefined) {
    console.error(`fuzz: --only takes ${Object.keys(FUZZERS).join(" or ")}, not '${name}'`);
    process.exit(2);
  }
  const summary = await fuzzer({ seed, seconds, firstCase });
  for (const finding of summary.findings) console.log(`\n${finding}`);
  for (const note of summary.notes) console.log(`${name}: ${note}`);
  console.log(`${name}: ${summary.cases} cases, ${summary.findings.length} findings`);
  cases += summary.cases;
  findingCount += summary.findings.length;
}
console.log(`fuzz: ${cases} cases, ${findingCount} findings`);
process.exitCode = findingCount === 0 && cases > 0 ? 0 : 1;
