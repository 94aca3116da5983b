// The commands whose functions scripts/code-cache.mjs keeps, in the working folder, where a disk.raw is. The last one is
// the program's own way, and ends the process.
"use strict";
const { join } = require("node:path");

const cli = join(__dirname, "../dist/src/cli");
const { runProgram } = require(join(cli, "program.cjs"));
const COMMANDS = [
  ["create", "-f", "qcow2", "empty.qcow2", "1M"],
  ["backup", "-q", "-O", "qcow2", "disk.raw", "disk.qcow2"],
  ["backup", "-q", "-c", "disk.raw", "small.qcow2"],
  ["backup", "-q", "--verify", "disk.qcow2", "copy.raw"],
  ["info", "disk.raw"],
  ["info", "disk.qcow2"],
  ["info", "--json", "disk.qcow2"],
  ["map", "disk.qcow2"],
  ["check", "disk.qcow2"],
  ["compare", "disk.raw", "disk.qcow2"],
];
/** Of what a client of a server does as far as it can without one: this fails. */
const CLIENTS = [
  ["backup", "-q", "--control", "control.sock", "live.qcow2"],
  ["jobs", "--control", "control.sock"],
];
const LAST = ["backup", "-q", "disk.raw", "last.raw"];

async function run(argv, expected) {
  const { stdout, env: environment } = process;
  const said = [];
  const stderr = { write: (text) => said.push(text) };
  const code = await runProgram(argv, { stdout, stderr, environment });
  if (code !== expected) throw new Error(`cowcatcher ${argv.join(" ")}: exit code ${code}: ${said.join("")}`);
}

async function runAll() {
  for (const argv of COMMANDS) await run(argv, 0);
  for (const argv of CLIENTS) await run(argv, 1);
  process.argv = [process.argv[0], join(cli, "main.cjs"), ...LAST];
  require(join(cli, "main.cjs"));
}

runAll().catch((error) => {
  console.error(error);
  process.exit(1);
});
