// An image opened and closed as `serve` does it, with its tracker, in this process: for tests of what is believed of it.
import { openImage } from "../../src/image/open.js";
import { Qcow2Image } from "../../src/image/qcow2/image.js";
import type { Image } from "../../src/block/device.js";
import { openTrackers, type TrackedDisks } from "../../src/cli/actions/serve-tracking.js";
import type { CommandContext } from "../../src/cli/output/context.js";
import { DiskNode } from "../../src/cow/disk-node.js";
import type { DiskTracker } from "../../src/tracking/tracker.js";

const CONTEXT = {
  command: "serve",
  logger: { info: () => undefined, warn: () => undefined },
} as unknown as CommandContext;

export const GRANULE_BYTES = 65_536;

export class TrackedImage {
  private constructor(
    readonly image: Image,
    private readonly disks: TrackedDisks,
    readonly tracker: DiskTracker,
    private readonly node: DiskNode,
  ) {}

  static async open(path: string): Promise<TrackedImage> {
    const format = path.endsWith(".qcow2") ? "qcow2" : "raw";
    const image = await openImage(path, { format, readOnly: false, defersWriting: true });
    const served = { path, name: "disk", format } as const;
    const settings = { mode: "host", directory: undefined, isAskedFor: true } as const;
    const disks = await openTrackers([{ served, image }], settings, CONTEXT);
    if (image instanceof Qcow2Image) await image.beginWriting();
    const tracker = disks.byName.get("disk");
    if (tracker === undefined) throw new Error("the disk is not tracked");
    return new TrackedImage(image, disks, tracker, new DiskNode("disk", image, tracker));
  }

  /** As a guest's write. */
  async write(offsetBytes: number, content: Uint8Array): Promise<void> {
    await this.node.write(content, 0, content.length, offsetBytes);
  }

  async checkpoint(name: string): Promise<void> {
    await this.tracker.prepareFreeze();
    const epoch = await DiskNode.quiesceAll([this.node], () => this.tracker.freeze(), 60_000);
    await this.tracker.commit(epoch, name, crypto.randomUUID(), Date.now());
    epoch.release();
  }

  /** Numbers of the granules that have changed since; undefined where the checkpoint is gone. */
  async changes(name: string): Promise<number[] | undefined> {
    if (this.tracker.checkpoint(name) === undefined) return undefined;
    const bits = await this.tracker.changesSince(name);
    return Array.from({ length: bits.granuleCount }, (_, granule) => granule).filter((n) => bits.has(n));
  }

  async close(): Promise<void> {
    await this.disks.imagesClose();
    await this.image.close();
    await this.disks.close();
  }
}
