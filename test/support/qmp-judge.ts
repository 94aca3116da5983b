// The same QMP commands to our server and to a qemu-storage-daemon, over disks with the same content that a guest writes
// alike: what both answer can be laid side by side.
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { expect } from "vitest";
import { type QmpMessage, RawQmp } from "./raw-qmp.js";
import { mustRun, Server, until } from "./server.js";

export interface Peer {
  readonly name: "ours" | "theirs";
  readonly folder: string;
  readonly client: RawQmp;
  /** Of the disk `disk`. */
  readonly uri: string;
  uriOf(disk: string): string;
}

class JudgedPeer implements Peer {
  #client: RawQmp | undefined;

  constructor(
    readonly name: "ours" | "theirs",
    readonly folder: string,
  ) {}

  get client(): RawQmp {
    if (this.#client === undefined) throw new Error(`${this.name} was never started`);
    return this.#client;
  }

  get uri(): string {
    return this.uriOf("disk");
  }

  async connect(control: string): Promise<void> {
    this.#client = await RawQmp.negotiated(control);
  }

  uriOf(disk: string): string {
    return `nbd+unix:///${disk}?socket=${join(this.folder, "nbd.sock")}`;
  }
}

interface Bitmap {
  name?: string;
  count: number;
  recording: boolean;
  busy: boolean;
}

export interface TargetSetup {
  format?: "raw" | "qcow2";
  create?: readonly string[];
  /** As large as the disk unless told otherwise. */
  sizeBytes?: number;
  /** As JudgedSetup's. */
  theirFaults?: readonly object[];
}

export interface JudgedSetup {
  format?: "raw" | "qcow2";
  /** Of either peer; each as large as the others. */
  disks?: readonly string[];
  /** A raw file below each disk of either peer, which nobody writes. */
  backing?: string;
  /** COWCATCHER_FAULTS of ours. */
  ourFaults?: string;
  /** What blkdebug does to each of their disks, one at least (inject-error; a sector is 512 bytes of the file). */
  theirFaults?: readonly object[];
}

export class Judged {
  #daemon: ChildProcess | undefined;
  #server: Server | undefined;

  private constructor(
    readonly ours: JudgedPeer,
    readonly theirs: JudgedPeer,
    readonly sizeBytes: number,
    private readonly setup: Required<Pick<JudgedSetup, "format" | "disks">> & JudgedSetup,
  ) {}

  /** Empty disks of either, one called `disk` unless told otherwise. @param folder for the files of both */
  static async start(folder: string, sizeBytes: number, given: JudgedSetup = {}): Promise<Judged> {
    const setup = { format: "qcow2", disks: ["disk"], ...given } as const;
    const [ours, theirs] = (["ours", "theirs"] as const).map(
      (name) => new JudgedPeer(name, join(folder, name)),
    );
    if (ours === undefined || theirs === undefined) throw new Error("no peers");
    const below = setup.backing === undefined ? [] : ["-b", setup.backing, "-F", "raw"];
    for (const { folder: own } of [ours, theirs]) {
      await mustRun("mkdir", own);
      for (const disk of setup.disks) {
        const size = String(sizeBytes);
        await mustRun("qemu-img", "create", "-q", "-f", setup.format, ...below, join(own, disk), size);
      }
    }
    const judged = new Judged(ours, theirs, sizeBytes, setup);
    try {
      await Promise.all([judged.startOurs(setup.ourFaults), judged.#startTheirs()]);
    } catch (error) {
      judged.#daemon?.kill();
      throw error;
    }
    return judged;
  }

  /** Ours, or ours again, when it has been stopped. */
  async startOurs(faults?: string): Promise<void> {
    const { format, disks } = this.setup;
    const own = this.ours.folder;
    const images = disks.map((disk) => `${join(own, disk)}=${disk}`);
    const env: Record<string, string> = faults === undefined ? {} : { COWCATCHER_FAULTS: faults };
    this.#server = await Server.start(own, images, { args: ["-f", format], env });
    await this.ours.connect(this.#server.control);
  }

  async stopOurs(): Promise<void> {
    this.ours.client.close();
    const { code, stderr } = (await this.#server?.stop()) ?? { code: 0 };
    if (code !== 0) throw new Error(`the server ended with ${code}: ${stderr}`);
  }

  async #startTheirs(): Promise<void> {
    const { format, disks, theirFaults } = this.setup;
    const own = this.theirs.folder;
    const nodes = disks.flatMap((disk) => {
      // A guest's trims are ignored unless both nodes are told.
      const discard = "unmap";
      const file = { driver: "file", filename: join(own, disk), discard };
      const broken = { driver: "blkdebug", image: file, "inject-error": theirFaults };
      const below = theirFaults === undefined ? file : broken;
      const node = { driver: format, "node-name": disk, file: below, discard };
      return [
        ...["--blockdev", JSON.stringify(node)],
        ...["--export", `nbd,id=${disk},node-name=${disk},name=${disk},writable=on`],
      ];
    });
    const daemon = spawn("qemu-storage-daemon", [
      ...["--nbd-server", `addr.type=unix,addr.path=${join(own, "nbd.sock")}`],
      ...nodes,
      ...["--chardev", `socket,path=${join(own, "qmp.sock")},server=on,wait=off,id=monitor`],
      ...["--monitor", "chardev=monitor"],
    ]);
    this.#daemon = daemon;
    let said = "";
    daemon.stderr.setEncoding("utf8").on("data", (text: string) => (said += text));
    await until("the daemon listens", () => {
      if (daemon.exitCode !== null) throw new Error(`the daemon ended with ${daemon.exitCode}: ${said}`);
      return existsSync(join(own, "qmp.sock"));
    });
    await this.theirs.connect(join(own, "qmp.sock"));
  }

  async close(): Promise<void> {
    this.theirs.client.close();
    const daemon = this.#daemon;
    this.#daemon = undefined;
    daemon?.kill();
    if (daemon !== undefined && daemon.exitCode === null) await once(daemon, "close");
    await this.stopOurs();
  }

  get peers(): readonly Peer[] {
    return [this.ours, this.theirs];
  }

  /** @param args of each peer, where they differ in paths @returns our answer, which is like theirs */
  async same(execute: string, args?: object | ((peer: Peer) => object)): Promise<QmpMessage> {
    const argsOf = (peer: Peer): object | undefined =>
      typeof args === "function" ? (args as (of: Peer) => object)(peer) : args;
    const [our, their] = await Promise.all(
      this.peers.map((peer) => peer.client.ask({ execute, arguments: argsOf(peer) })),
    );
    expect(withoutFolder(our, this.ours), `${execute} ${JSON.stringify(args)}`).toEqual(
      withoutFolder(their, this.theirs),
    );
    if (our === undefined) throw new Error("no peers");
    return our;
  }

  /** Commands of qemu-io, to both. */
  async write(...commands: string[]): Promise<void> {
    await this.writeTo("disk", ...commands);
  }

  async writeTo(disk: string, ...commands: string[]): Promise<void> {
    const args = ["-f", "raw", ...commands.flatMap((command) => ["-c", command])];
    await Promise.all(this.peers.map((peer) => mustRun("qemu-io", ...args, peer.uriOf(disk))));
  }

  /** Our bitmaps of a disk, which are like theirs. */
  async sameBitmaps(disk = "disk"): Promise<Bitmap[]> {
    const [our, their] = await Promise.all(this.peers.map((peer) => bitmapsOf(peer, disk)));
    expect(our).toEqual(their);
    return our ?? [];
  }

  /** An empty image, of both. @param create further arguments of qemu-img create */
  async makeTarget(
    name: string,
    { format = "qcow2", create = [], sizeBytes }: TargetSetup = {},
  ): Promise<void> {
    const size = String(sizeBytes ?? this.sizeBytes);
    await Promise.all(
      this.peers.map(({ folder }) =>
        mustRun("qemu-img", "create", "-q", "-f", format, ...create, join(folder, name), size),
      ),
    );
  }

  /** An empty image and a node for it, of both. */
  async addTarget(node: string, setup: TargetSetup = {}): Promise<void> {
    await this.makeTarget(node, setup);
    const { format = "qcow2", theirFaults } = setup;
    await this.same("blockdev-add", ({ folder, name }) => {
      const file = { driver: "file", filename: join(folder, node) };
      const broken = { driver: "blkdebug", image: file, "inject-error": theirFaults };
      const isBroken = name === "theirs" && theirFaults !== undefined;
      return { driver: format, "node-name": node, file: isBroken ? broken : file };
    });
  }

  /** Until a job of both is in that state, `gone` included. */
  async untilJob(id: string, status: string): Promise<void> {
    for (const { client, name } of this.peers) {
      await until(`job ${id} of ${name} is ${status}`, async () => {
        const { return: jobs } = await client.ask({ execute: "query-jobs" });
        const job = (jobs as { id: string; status: string }[]).find((candidate) => candidate.id === id);
        return (job?.status ?? "gone") === status;
      });
    }
  }

  /** Changes of status and events of the job since the last call, of both alike. */
  sameEvents(id: string): string[] {
    const [our, their] = this.peers.map(({ client }) => {
      const events = client.messages.filter(
        ({ event, data }) => event !== undefined && (data?.["id"] === id || data?.["device"] === id),
      );
      const names = events.map(({ event, data }) =>
        event === "JOB_STATUS_CHANGE" ? String(data?.["status"]) : event,
      );
      // QEMU pauses its jobs for a moment when it drains the node, as at their end (219.out has that, too).
      return names.filter(
        (name, at) => name !== "paused" && !(name === "running" && names[at - 1] === "paused"),
      );
    });
    expect(our).toEqual(their);
    return (our ?? []) as string[];
  }
}

async function bitmapsOf({ client }: Peer, disk: string): Promise<Bitmap[]> {
  const { return: nodes } = await client.ask({ execute: "query-named-block-nodes" });
  const node = (
    nodes as { "node-name": string; "dirty-bitmaps"?: (Bitmap & { persistent?: boolean })[] }[]
  ).find((candidate) => candidate["node-name"] === disk);
  const shown = (node?.["dirty-bitmaps"] ?? []).map((bitmap) => {
    const copy = { ...bitmap };
    // Ours outlive the server whether asked to or not.
    delete copy.persistent;
    return copy;
  });
  // QEMU's copying has a nameless one of its own, which records nothing.
  const known = shown.filter(({ name, recording }) => name !== undefined || recording);
  return known.sort((a, b) => ((a.name ?? "") < (b.name ?? "") ? -1 : 1));
}

function withoutFolder(answer: QmpMessage | undefined, { folder }: Peer): unknown {
  const text = JSON.stringify(answer).replaceAll(folder, "FOLDER");
  const plain = JSON.parse(text) as { error?: Record<string, unknown> };
  delete plain.error?.["x-cowcatcher"];
  return plain;
}
