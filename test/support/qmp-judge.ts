// The same QMP commands to our server and to a qemu-storage-daemon, over disks with the same content that a guest writes
// alike: what both answer can be laid side by side.
import { spawn } from "node:child_process";
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
  readonly uri: string;
}

interface Bitmap {
  name?: string;
  count: number;
  recording: boolean;
  busy: boolean;
}

export class Judged {
  private constructor(
    readonly ours: Peer,
    readonly theirs: Peer,
    readonly sizeBytes: number,
    readonly close: () => Promise<void>,
  ) {}

  /** One empty disk of either, called `disk`. @param folder for the files of both */
  static async start(folder: string, sizeBytes: number, format: "raw" | "qcow2" = "qcow2"): Promise<Judged> {
    const [ours, theirs] = await Promise.all(
      (["ours", "theirs"] as const).map(async (name) => {
        const own = join(folder, name);
        await mustRun("mkdir", own);
        await mustRun("qemu-img", "create", "-q", "-f", format, join(own, "disk"), String(sizeBytes));
        return own;
      }),
    );
    if (ours === undefined || theirs === undefined) throw new Error("no folders");
    const server = await Server.start(ours, [`${join(ours, "disk")}=disk`], { args: ["-f", format] });
    const daemon = spawn("qemu-storage-daemon", [
      ...["--blockdev", `file,filename=${join(theirs, "disk")},node-name=file`],
      ...["--blockdev", `${format},file=file,node-name=disk`],
      ...["--nbd-server", `addr.type=unix,addr.path=${join(theirs, "nbd.sock")}`],
      ...["--export", "nbd,id=disk,node-name=disk,name=disk,writable=on"],
      ...["--chardev", `socket,path=${join(theirs, "qmp.sock")},server=on,wait=off,id=monitor`],
      ...["--monitor", "chardev=monitor"],
    ]);
    await until("the daemon listens", () => existsSync(join(theirs, "qmp.sock")));
    const peer = async (name: Peer["name"], own: string, control: string, uri: string): Promise<Peer> => ({
      name,
      folder: own,
      client: await RawQmp.negotiated(control),
      uri,
    });
    const ourPeer = await peer("ours", ours, server.control, server.uri());
    const uri = `nbd+unix:///disk?socket=${join(theirs, "nbd.sock")}`;
    const theirPeer = await peer("theirs", theirs, join(theirs, "qmp.sock"), uri);
    return new Judged(ourPeer, theirPeer, sizeBytes, async () => {
      ourPeer.client.close();
      theirPeer.client.close();
      daemon.kill();
      await once(daemon, "close");
      await server.stop();
    });
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
    const args = ["-f", "raw", ...commands.flatMap((command) => ["-c", command])];
    await Promise.all(this.peers.map(({ uri }) => mustRun("qemu-io", ...args, uri)));
  }

  /** Our bitmaps of the disk, which are like theirs. */
  async sameBitmaps(): Promise<Bitmap[]> {
    const [our, their] = await Promise.all(this.peers.map(bitmapsOf));
    expect(our).toEqual(their);
    return our ?? [];
  }

  /** An empty image and a node for it, of both. */
  async addTarget(node: string, format: "raw" | "qcow2" = "qcow2"): Promise<void> {
    const size = String(this.sizeBytes);
    await Promise.all(
      this.peers.map(({ folder }) =>
        mustRun("qemu-img", "create", "-q", "-f", format, join(folder, node), size),
      ),
    );
    await this.same("blockdev-add", ({ folder }) => ({
      driver: format,
      "node-name": node,
      file: { driver: "file", filename: join(folder, node) },
    }));
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

async function bitmapsOf({ client }: Peer): Promise<Bitmap[]> {
  const { return: nodes } = await client.ask({ execute: "query-named-block-nodes" });
  const node = (
    nodes as { "node-name": string; "dirty-bitmaps"?: (Bitmap & { persistent?: boolean })[] }[]
  ).find((candidate) => candidate["node-name"] === "disk");
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
