// The gate of a job's T0 (qemu/t0-gate.ts), kept for one try: whoever has frozen the guest asks at its socket, the hook's
// phase `t0` is run, and T0 may be when that went well. The socket is in a folder of its own, which only the one who is to
// ask may enter: this user, or the one to whom the server's control socket belongs.
import { chmodSync, chownSync, mkdtempSync, rmSync, statSync } from "node:fs";
import { createServer, type Server, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { ioError, messageOf } from "../errors.js";
import { GATE_OPEN } from "../qemu/t0-gate.js";
import { listenAtPath } from "../unix-socket.js";

/** One asks; more are nobody whom we know. */
const MAX_CONNECTIONS = 2;

export class GateKeeper {
  readonly path: string;
  readonly #folder: string;
  readonly #server: Server;
  readonly #sockets = new Set<Socket>();
  readonly #passing: Promise<void>[] = [];

  private constructor(folder: string, pass: () => Promise<void>) {
    this.#folder = folder;
    this.path = join(folder, "t0");
    this.#server = createServer((socket) => void this.#answer(socket, pass));
    this.#server.maxConnections = MAX_CONNECTIONS;
  }

  /**
   * @param pass what is to be done before T0; its failure keeps the gate shut
   * @param server control socket of the server that is to ask; undefined: it is a process of this user
   * @throws CowcatcherError IO
   */
  static async open(pass: () => Promise<void>, server: string | undefined): Promise<GateKeeper> {
    const folder = mkdtempSync(join(tmpdir(), "cowcatcher-t0-"));
    const keeper = new GateKeeper(folder, pass);
    try {
      await listenAtPath(keeper.#server, keeper.path, { mode: 0o600 });
      if (server !== undefined) keeper.#admit(statSync(server).uid);
      return keeper;
    } catch (error) {
      keeper.#remove();
      throw ioError("open the gate of T0", keeper.path, error);
    }
  }

  /** Another user than root can give nothing away; it then reaches its own servers alone. */
  #admit(uid: number): void {
    if (process.getuid?.() !== 0 || uid === 0) return;
    for (const path of [this.path, this.#folder]) chownSync(path, uid, -1);
    chmodSync(this.#folder, 0o700);
  }

  /** Fulfilled when nothing of `pass` is under way any more. */
  async close(): Promise<void> {
    this.#remove();
    await Promise.allSettled(this.#passing);
  }

  #remove(): void {
    for (const socket of this.#sockets) socket.destroy();
    this.#server.close();
    rmSync(this.#folder, { recursive: true, force: true });
  }

  async #answer(socket: Socket, pass: () => Promise<void>): Promise<void> {
    this.#sockets.add(socket);
    socket.on("close", () => this.#sockets.delete(socket));
    // Whoever asked may be gone before the answer.
    socket.on("error", () => undefined);
    try {
      const passing = pass();
      this.#passing.push(passing);
      await passing;
      socket.end(`${GATE_OPEN}\n`);
    } catch (error) {
      socket.end(`${messageOf(error).replace(/\s+/g, " ")}\n`);
    }
  }
}
