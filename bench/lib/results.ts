// Where a benchmark's results go, and what machine they come from.

import { mkdirSync, writeFileSync } from "node:fs";
import { cpus, release, totalmem } from "node:os";
import { resolve } from "node:path";
import { formatBytes } from "../../src/units.js";
import { runProgram } from "./children.js";

export interface Machine {
  cpu: string;
  cores: number;
  memory: string;
  kernel: string;
  node: string;
  qemu: string;
}

export async function describeMachine(): Promise<Machine> {
  const processors = cpus();
  const { stdout } = await runProgram("qemu-img", ["--version"]);
  return {
    cpu: processors[0]?.model ?? "unknown",
    cores: processors.length,
    memory: formatBytes(totalmem()),
    kernel: release(),
    node: process.version,
    qemu: /version (\S+)/.exec(stdout)?.[1] ?? "unknown",
  };
}

export function machineLine({ cpu, cores, memory, kernel, node, qemu }: Machine): string {
  return `${cores} × ${cpu}, ${memory}, Linux ${kernel}, Node ${node}, QEMU ${qemu}`;
}

/** Results of one run in a folder, rewritten as the run goes on, so that an interrupted one leaves what it has. */
export class ResultFolder {
  readonly path: string;

  constructor(folder: string) {
    this.path = resolve(folder);
    mkdirSync(this.path, { recursive: true });
  }

  write(name: string, content: string | object): string {
    const path = resolve(this.path, name);
    const text = typeof content === "string" ? content : JSON.stringify(content, null, 2);
    writeFileSync(path, text.endsWith("\n") ? text : `${text}\n`);
    return path;
  }
}
