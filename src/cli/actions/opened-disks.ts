// Images that join a running server: opened for a first export, closed after the last. What `serve` does for its own
// images at its start, here for one at a time.

import type { Image } from "../../block/device.js";
import type { ImageFormat } from "../../block/format.js";
import { DiskNode } from "../../cow/disk-node.js";
import { CowcatcherError } from "../../errors.js";
import { Qcow2Image } from "../../image/qcow2/image.js";
import { openAnyImage } from "../../repository/open.js";
import type { DiskTracker } from "../../tracking/tracker.js";
import type { ServeSettings } from "../options/serve-options.js";
import type { CommandContext } from "../output/context.js";
import { openTrackers, type TrackedDisks } from "./serve-tracking.js";

/** Each has descriptors, locks and a tracker. */
const DISK_COUNT_MAX = 64;

interface OpenedDisk {
  image: Image;
  tracked: TrackedDisks;
}

/** Main thread. */
export class OpenedDisks {
  readonly #disks = new Map<string, OpenedDisk | null>();
  readonly #closing = new Set<Promise<void>>();
  #isEnding = false;

  /** @param nodes, trackers of the server (LiveHost), by name: changed here */
  constructor(
    private readonly nodes: Map<string, DiskNode>,
    private readonly trackers: Map<string, DiskTracker>,
    private readonly settings: Pick<ServeSettings, "tracking" | "direct">,
    private readonly context: CommandContext,
  ) {}

  has(name: string): boolean {
    return this.#disks.has(name);
  }

  /** @throws CowcatcherError BUSY, LIMIT; as openImage */
  async open(
    name: string,
    { path, format, readOnly }: { path: string; format: ImageFormat; readOnly: boolean },
  ): Promise<void> {
    if (this.#isEnding || this.nodes.has(name) || this.#disks.has(name)) {
      throw new CowcatcherError({ code: "BUSY", object: name, problem: "is being opened or closed" });
    }
    if (this.#disks.size >= DISK_COUNT_MAX) {
      throw new CowcatcherError({
        code: "LIMIT",
        object: name,
        problem: `${DISK_COUNT_MAX} disks were added already`,
      });
    }
    this.#disks.set(name, null);
    let image: Image | undefined;
    let tracked: TrackedDisks | undefined;
    try {
      const { direct, tracking } = this.settings;
      image = await openAnyImage(path, { format, readOnly, direct, defersWriting: true });
      const served = { name, path, format };
      tracked = await openTrackers([{ served, image }], tracking, this.context);
      // What a bitmap in it tells of others' writes is known by now.
      if (image instanceof Qcow2Image) await image.beginWriting();
      const tracker = tracked.byName.get(name);
      if (tracker !== undefined) this.trackers.set(name, tracker);
      this.nodes.set(name, new DiskNode(name, image, tracker ?? null));
      this.#disks.set(name, { image, tracked });
    } catch (error) {
      this.#disks.delete(name);
      await image?.close();
      await tracked?.close();
      throw error;
    }
  }

  /** Nobody uses it any more. Never rejects: what could not be written is in the log. */
  close(name: string): Promise<void> {
    const disk = this.#disks.get(name);
    if (disk === undefined || disk === null) return Promise.resolve();
    this.nodes.delete(name);
    this.trackers.delete(name);
    const closing = this.#closeDisk(name, disk).finally(() => this.#closing.delete(closing));
    this.#closing.add(closing);
    return closing;
  }

  async #closeDisk(name: string, { image, tracked }: OpenedDisk): Promise<void> {
    await tracked.imagesClose();
    try {
      await image.close();
    } catch (error) {
      this.context.logger.error({ err: error, disk: name }, "a disk that was removed could not be closed");
    }
    await tracked.close();
    this.#disks.delete(name);
  }

  /** With the server's last client gone. */
  async end(): Promise<void> {
    this.#isEnding = true;
    await Promise.all([...this.#closing, ...[...this.#disks.keys()].map((name) => this.close(name))]);
  }
}
