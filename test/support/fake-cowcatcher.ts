// A program in the place of cowcatcher for runs: it writes down how it was called, and answers as a script says.
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import type { ProgramWords } from "../../src/run/child.js";

export interface Answer {
  /** The command begins with these words. */
  command: string;
  /** Taken by one call, unless it is for all. */
  once?: boolean;
  exitCode?: number;
  stdout?: object[];
  stderr?: string;
  /** Makes the files that end the arguments, as many as there are `summary` messages. */
  writesTargets?: boolean;
  /** Asks at --t0-gate before its T0, if there is one; fails with its words where it stays shut. */
  asksGate?: boolean;
  /** Never ends by itself; says so in a file `waiting`. */
  hangs?: boolean;
}

const PROGRAM = `
const fs = require("node:fs");
const [folder, ...args] = process.argv.slice(2);
fs.appendFileSync(folder + "/calls", JSON.stringify(args) + "\\n");
const answers = JSON.parse(fs.readFileSync(folder + "/answers", "utf8"));
const index = answers.findIndex(({ command }) => args.join(" ").startsWith(command));
const answer = answers[index] ?? {};
if (answer.once) fs.writeFileSync(folder + "/answers", JSON.stringify(answers.filter((_, at) => at !== index)));
process.stderr.write(answer.stderr ?? "");
const words = args.filter((word) => word !== "--json");
if (answer.writesTargets) for (const path of words.slice(-(answer.stdout ?? []).length)) fs.writeFileSync(path, "data");
const say = (message) => process.stdout.write(JSON.stringify(message) + "\\n");
const end = () => {
  for (const message of answer.stdout ?? []) say(message);
  process.exitCode = answer.exitCode ?? 0;
};
const gate = args.find((word) => word.startsWith("--t0-gate="))?.slice("--t0-gate=".length);
if (answer.asksGate && gate !== undefined) {
  let line = "";
  require("node:net").connect(gate).setEncoding("utf8").on("data", (text) => (line += text)).on("close", () => {
    if (line === "go\\n") return say({ message_type: "started" }), end();
    process.exitCode = 1;
    say({ message_type: "error", error: { code: "IO", object: gate, problem: line.trim(), hint: null } });
  });
} else end();
if (answer.hangs) {
  fs.writeFileSync(folder + "/waiting", "");
  setInterval(() => undefined, 1000);
}
`;

export class FakeCowcatcher {
  readonly program: ProgramWords;

  constructor(private readonly folder: string) {
    const script = join(folder, "fake.cjs");
    writeFileSync(script, PROGRAM);
    this.program = [process.execPath, script, folder];
    this.answer([]);
  }

  answer(answers: readonly Answer[]): void {
    writeFileSync(join(this.folder, "answers"), JSON.stringify(answers));
    writeFileSync(join(this.folder, "calls"), "");
  }

  /** Its calls, the words of each with spaces between, without --json. */
  get calls(): string[] {
    const lines = readFileSync(join(this.folder, "calls"), "utf8").trim().split("\n");
    return lines
      .filter((line) => line !== "")
      .map((line) => (JSON.parse(line) as string[]).filter((word) => word !== "--json").join(" "));
  }
}

export const summary = (more: object = {}): object => ({
  message_type: "summary",
  target: "",
  t0: "2026-11-28T02:00:00.000Z",
  bytes: 10,
  bytes_written: 5,
  bytes_on_target: 6,
  ...more,
});

export const failure = (code: string, problem: string): object => ({
  message_type: "error",
  error: { code, object: "disk", problem, hint: null, offset: null, errno: null, message: "" },
});
