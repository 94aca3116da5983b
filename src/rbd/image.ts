// An RBD image, or a snapshot of one, as a source and for info, map, compare: read-only. Main thread; what waits for Ceph is
// the keeper's, reads are asynchronous (io.ts).
//
// Not for a guest: `serve` refuses it by name. A guest's write would wait for Ceph, which is what cowcatcher is there to avoid,
// and QEMU has a driver of its own.

import { CowcatcherError } from "../errors.js";
import type {
  BlockStatus,
  Completion,
  FrozenSource,
  Image,
  RbdHandle,
  RbdSourceDescription,
} from "../block/device.js";
import { type ExtentMap, ExtentReader } from "../block/extent-map.js";
import { parseRbdAddress } from "./address.js";
import { checkAddressFiles } from "./connect.js";
import { createDoorMemory } from "./door.js";
import { RbdIo } from "./io.js";
import { RbdKeeper } from "./keeper.js";
import type { OpenedImage } from "./keeper-protocol.js";

export interface OpenRbdOptions {
  readOnly: boolean;
  /** Refuse an image that another client may write; true by default. A snapshot never is. */
  lock?: boolean | undefined;
  /** Asked while an answer is awaited; true ends the wait. */
  isCancelled?: (() => boolean) | undefined;
}

/**
 * @throws CowcatcherError USAGE for a wrong address; UNSUPPORTED to write, without librbd, and for an image that is being
 *   migrated; NOT_FOUND, LOCKED, IO; CANCELLED.
 */
export async function openRbdImage(text: string, options: OpenRbdOptions): Promise<RbdImage> {
  const address = parseRbdAddress(text);
  if (!options.readOnly) throw notForGuests(text);
  checkAddressFiles(address);
  const { lock = true, isCancelled = () => false } = options;
  const door = createDoorMemory();
  const keeper = new RbdKeeper(text, door);
  try {
    const { opened } = await keeper.request(
      { kind: "open-source", address, name: text, door, lock },
      isCancelled,
    );
    const { holes } = await keeper.request({ kind: "holes" }, isCancelled);
    if (opened === undefined || holes === undefined) throw new Error("the keeper did not say what it opened");
    return new RbdImage(text, keeper, opened, { image: opened.image, door, name: text }, holes, isCancelled);
  } catch (error) {
    await keeper.release();
    throw error;
  }
}

export class RbdImage implements Image {
  readonly path: string;
  readonly name: string;
  readonly sizeBytes: number;
  readonly objectBytes: number;
  readonly readOnly = true;
  readonly clusterSizeBytes = 0;
  readonly format = "raw" as const;
  readonly probed = false;
  readonly backing = null;
  readonly files = [];
  readonly #keeper: RbdKeeper;
  readonly #handle: RbdHandle;
  readonly #zeroes: ExtentMap;
  readonly #extents: ExtentReader;
  readonly #io: RbdIo;

  constructor(
    name: string,
    keeper: RbdKeeper,
    { sizeBytes, objectBytes }: OpenedImage,
    handle: RbdHandle,
    zeroes: ExtentMap,
    isCancelled: () => boolean,
  ) {
    this.path = this.name = name;
    this.sizeBytes = sizeBytes;
    this.objectBytes = objectBytes;
    this.#keeper = keeper;
    this.#handle = handle;
    this.#zeroes = zeroes;
    this.#extents = new ExtentReader(zeroes, false);
    this.#io = new RbdIo(handle, isCancelled);
  }

  /** Bytes that hold data as far as the holes are known: what `qemu-img info` calls the disk size. */
  get allocatedBytes(): number {
    let bytes = 0;
    for (let at = 0; at < this.sizeBytes;) {
      const { lengthBytes, flag } = this.#extents.extentAt(at, this.sizeBytes - at);
      if (!flag) bytes += lengthBytes;
      at += lengthBytes;
    }
    return bytes;
  }

  read(buffer: Uint8Array, bufferOffset: number, lengthBytes: number, offsetBytes: number): Completion {
    return this.#io.read(buffer, bufferOffset, lengthBytes, offsetBytes);
  }

  write(): Completion {
    throw notForGuests(this.name);
  }

  writeZeroes(): Completion {
    throw notForGuests(this.name);
  }

  discard(): Completion {
    throw notForGuests(this.name);
  }

  flush(): Completion {
    return undefined;
  }

  blockStatus(offsetBytes: number, lengthBytes: number): BlockStatus {
    const { lengthBytes: found, flag } = this.#extents.extentAt(offsetBytes, lengthBytes);
    return {
      lengthBytes: found,
      zero: flag,
      data: !flag,
      depth: 0,
      present: true,
      compressed: false,
      hostOffsetBytes: offsetBytes,
    };
  }

  freeze(): FrozenSource {
    const description: RbdSourceDescription = {
      format: "rbd",
      name: this.name,
      sizeBytes: this.sizeBytes,
      handle: this.#handle,
      zeroes: this.#zeroes,
    };
    return { description, release: () => undefined };
  }

  async close(): Promise<void> {
    this.#io.close();
    await this.#keeper.release();
  }
}

function notForGuests(object: string): CowcatcherError {
  return new CowcatcherError({
    code: "UNSUPPORTED",
    object,
    problem: "an RBD image is not served to a guest",
    hint: "give the guest QEMU's own rbd driver, or map it with `rbd map` and serve /dev/rbdN",
  });
}
