// QEMU's guest agent as a test scripts it: the framing of the real one (qga/main.c), what it answers by the test's word.
import { mkdtempSync, rmSync } from "node:fs";
import { createServer, type Server, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";

const SYNC = "guest-sync-delimited";

interface Request {
  execute: string;
  arguments?: { id: number };
}

/** What a command comes to; a promise that never settles is an agent that hangs. Throws: the agent's refusal. */
export type AgentScript = (command: string) => unknown;

export class ScriptedAgent {
  readonly path: string;
  /** As they came; no sync. */
  readonly asked: string[] = [];
  /** In the order in which they were carried out; no sync. */
  readonly done: string[] = [];
  readonly clients: Socket[] = [];
  /** What an earlier client did not read, sent to each new one. */
  stale = "";
  script: AgentScript;
  readonly #folder = mkdtempSync(join(tmpdir(), "cowcatcher-agent-"));
  readonly #server: Server;
  #last: Promise<void> = Promise.resolve();

  constructor(script: AgentScript) {
    this.script = script;
    this.path = join(this.#folder, "qga.sock");
    this.#server = createServer((socket) => this.#serve(socket));
  }

  async listen(): Promise<this> {
    await new Promise<void>((resolve) => this.#server.listen(this.path, resolve));
    return this;
  }

  close(): void {
    this.#server.close();
    for (const socket of this.clients) socket.destroy();
    rmSync(this.#folder, { recursive: true, force: true });
  }

  #serve(socket: Socket): void {
    this.clients.push(socket);
    socket.on("error", () => undefined);
    socket.write(this.stale);
    let rest = Buffer.alloc(0);
    socket.on("data", (chunk) => {
      rest = Buffer.concat([rest, chunk]);
      for (let end = rest.indexOf("\n"); end >= 0; end = rest.indexOf("\n")) {
        const line = rest.subarray(0, end);
        rest = rest.subarray(end + 1);
        // Whatever stands before a 0xFF is forgotten.
        const text = line.subarray(line.lastIndexOf(0xff) + 1).toString();
        const { execute, arguments: args } = JSON.parse(text) as Request;
        if (execute !== SYNC) this.asked.push(execute);
        // One thing after another, also what a client that is gone has asked for.
        this.#last = this.#last.then(() => this.#carryOut(socket, execute, args?.id));
      }
    });
  }

  async #carryOut(socket: Socket, execute: string, id = 0): Promise<void> {
    if (execute === SYNC) {
      await this.script(execute);
      socket.write(Buffer.concat([Buffer.from([0xff]), Buffer.from(`{"return": ${id}}\n`)]));
      return;
    }
    this.done.push(execute);
    try {
      socket.write(`${JSON.stringify({ return: await this.script(execute) })}\n`);
    } catch (error) {
      socket.write(
        `${JSON.stringify({ error: { class: "GenericError", desc: (error as Error).message } })}\n`,
      );
    }
  }
}

/** A guest that freezes and thaws as it should, `count` file systems. */
export function guestWith(count: number): AgentScript {
  let isFrozen = false;
  return (command) => {
    const wasFrozen = isFrozen;
    if (command === "guest-fsfreeze-status") return isFrozen ? "frozen" : "thawed";
    if (command === "guest-fsfreeze-freeze") isFrozen = true;
    if (command === "guest-fsfreeze-thaw") isFrozen = false;
    return command === "guest-fsfreeze-thaw" && !wasFrozen ? 0 : count;
  };
}
