// A storage daemon's monitor that looks as if a guest's device were attached to its disk.
//
// The method `filter` puts its nodes between a device and its disk by `qom-set drive`. A storage daemon has no devices, and a
// machine whose processor is emulated has no guest that could keep a disk busy. So the guest is fio at an export of the node `top`,
// which passes everything through, and what would change the device's disk changes what `top` stands on:
//
//   qom-set /machine/…/virtio-backend drive=N   ─►   blockdev-reopen top, file=N
//
// Both drain the disk, swap one edge of the graph, and go on. Everything else goes to the daemon as it comes.

import { createServer, type Server, type Socket } from "node:net";
import { ControlClient } from "../../src/qmp/client.js";
import { JsonStream } from "../../src/qmp/json-stream.js";
import { isJsonObject, type JsonObject, QmpError, REQUEST_LIMITS } from "../../src/qmp/protocol.js";

/** The device's name, as `--disk` takes it. */
export const DEVICE = "vd0";
const QDEV = `/machine/peripheral/${DEVICE}/virtio-backend`;
/** What the device adds to what a daemon can do. */
const COMMANDS = ["query-block", "query-status", "qom-get", "qom-set", "stop", "cont"];

export class DeviceMonitor {
  readonly #server: Server;
  #drive: string;

  private constructor(
    private readonly daemon: string,
    private readonly top: string,
    disk: string,
  ) {
    this.#drive = disk;
    this.#server = createServer((socket) => void this.#serve(socket));
  }

  /**
   * Listens at `path`.
   * @param daemon its QMP socket
   * @param top a raw node of the daemon's, and the node `disk` below it
   */
  static listen(
    path: string,
    daemon: string,
    { top, disk }: { top: string; disk: string },
  ): Promise<DeviceMonitor> {
    const monitor = new DeviceMonitor(daemon, top, disk);
    return new Promise((resolve, reject) => {
      monitor.#server.once("error", reject);
      monitor.#server.listen(path, () => resolve(monitor));
    });
  }

  close(): void {
    this.#server.close();
  }

  async #serve(socket: Socket): Promise<void> {
    const client = await ControlClient.connect(this.daemon);
    const input = new JsonStream(REQUEST_LIMITS);
    const send = (message: JsonObject): void => void socket.write(`${JSON.stringify(message)}\n`);
    socket.on("error", () => client.close());
    socket.on("close", () => client.close());
    client.onLoss(() => socket.destroy());
    socket.on("data", (chunk) => {
      for (const item of input.push(chunk)) {
        if (!("value" in item) || !isJsonObject(item.value)) continue;
        const { execute, arguments: args, id } = item.value;
        this.#answer(client, String(execute), isJsonObject(args) ? args : {}).then(
          (result) => send({ return: result, id }),
          (error: unknown) => send({ error: refusal(error), id }),
        );
      }
    });
    send({ QMP: { version: {}, capabilities: [] } });
  }

  async #answer(client: ControlClient, command: string, args: JsonObject): Promise<unknown> {
    switch (command) {
      case "qmp_capabilities":
      case "stop":
      case "cont":
        return {};
      case "query-status":
        return { status: "running", running: true };
      case "query-block":
        return [{ device: "", qdev: QDEV, inserted: { "node-name": this.#drive } }];
      case "query-commands": {
        const known = await client.execute(command);
        return [...(Array.isArray(known) ? (known as unknown[]) : []), ...COMMANDS.map((name) => ({ name }))];
      }
      case "qom-get":
        throw new QmpError("GenericError", `Property '${String(args["property"])}' not found`);
      case "qom-set":
        return this.#setDrive(client, String(args["value"]));
      default:
        return client.execute(command, args);
    }
  }

  async #setDrive(client: ControlClient, node: string): Promise<JsonObject> {
    const top = { driver: "raw", "node-name": this.top, file: node, discard: "unmap" };
    await client.execute("blockdev-reopen", { options: [top] });
    this.#drive = node;
    return {};
  }
}

function refusal(error: unknown): JsonObject {
  if (error instanceof QmpError) return { class: error.errorClass, desc: error.desc };
  return { class: "GenericError", desc: error instanceof Error ? error.message : String(error) };
}
