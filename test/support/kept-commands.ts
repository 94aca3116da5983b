// Commands without the start of a process for each: a third of a second of processor time, and the tests run a thousand.
// A process stays for the next command; one that is busy is left alone, and another started beside it. What a command
// prints and its exit code are runProgram's; what main.ts and start.ts add (signals, streams that are closed, the end of
// the process) is for `cowcatcherProcess`.
import { type ChildProcess, fork } from "node:child_process";
import type { KeptRequest, KeptResult } from "./kept-command.js";

const idle: ChildProcess[] = [];

/** @param script the built kept-command.js. @throws Error where its process ended */
export async function runKept(script: string, request: KeptRequest): Promise<KeptResult> {
  const child = idle.pop() ?? (await start(script));
  const result = await answerOf(child, () => child.send(request));
  idle.push(child);
  return result as KeptResult;
}

async function start(script: string): Promise<ChildProcess> {
  const child = fork(script, { execArgv: [], stdio: ["ignore", "ignore", "inherit", "ipc"] });
  await answerOf(child, () => undefined);
  // Neither keeps this process; it ends when this one does.
  child.unref();
  child.channel?.unref();
  return child;
}

function answerOf(child: ChildProcess, ask: () => void): Promise<unknown> {
  return new Promise((settle, reject) => {
    const onExit = (code: number | null, signal: string | null): void => {
      reject(new Error(`a kept command's process ended with ${code ?? signal}`));
    };
    child.once("exit", onExit);
    child.once("message", (answer) => {
      child.off("exit", onExit);
      settle(answer);
    });
    ask();
  });
}
