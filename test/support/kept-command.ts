// A process that carries out commands one after another: what `cowcatcher ARGS` would print, and its exit code, without
// the start of a process for each. It is built with the program (tsconfig.build.json); kept-commands.ts starts it.
import { runProgram } from "../../src/cli/program.js";

export interface KeptRequest {
  args: readonly string[];
  cwd: string;
}

export interface KeptResult {
  code: number;
  stdout: string;
  stderr: string;
}

process.on("message", (request: KeptRequest) => {
  void carryOut(request).then((result) => process.send?.(result));
});
// Node 20 aborts where a thread boots while process.exit() runs, and nothing here is worth an orderly end.
process.on("disconnect", () => process.kill(process.pid, "SIGKILL"));
process.send?.("ready");

async function carryOut({ args, cwd }: KeptRequest): Promise<KeptResult> {
  process.chdir(cwd);
  let stdout = "";
  let stderr = "";
  const code = await runProgram(args, {
    stdout: { write: (text) => (stdout += text) },
    stderr: { write: (text) => (stderr += text) },
    environment: process.env,
  });
  return { code, stdout, stderr };
}
