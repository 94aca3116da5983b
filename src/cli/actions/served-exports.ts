// What `serve` offers by NBD: its disks from the start to the end, and the T0 views of jobs for as long as those run.

import type { SnapshotPublisher } from "../../backup/job/snapshot.js";
import type { DiskNode } from "../../cow/disk-node.js";
import { CowcatcherError } from "../../errors.js";
import type { BlockDevice } from "../../block/device.js";
import type { StatusContext } from "../../nbd/server/export.js";
import type { NbdExport, NbdServer } from "../../nbd/server/server.js";

export class ServedExports implements SnapshotPublisher {
  /** The server looks into it for each client; it changes as jobs come and go. */
  readonly byName = new Map<string, NbdExport>();
  #server: Pick<NbdServer, "endExport"> | undefined;

  /** @param contexts metadata contexts of each node besides base:allocation, in the nodes' order */
  constructor(nodes: ReadonlyMap<string, DiskNode>, contexts: readonly StatusContext[][] = []) {
    for (const [name, device] of nodes) {
      this.byName.set(name, {
        name,
        description: device.name,
        device,
        readOnly: device.readOnly,
        canMultiConn: true,
        contexts: contexts[this.byName.size] ?? [],
      });
    }
  }

  /** The server that offers them, made after this map. */
  attach(server: Pick<NbdServer, "endExport">): void {
    this.#server = server;
  }

  publish(name: string, device: BlockDevice): () => void {
    if (this.byName.has(name)) {
      throw new CowcatcherError({
        code: "EXISTS",
        object: name,
        problem: "a snapshot cannot be exported under the name of a served image",
        hint: "serve that image under another name",
      });
    }
    const nbdExport: NbdExport = {
      name,
      description: "snapshot at the start of a job",
      device,
      readOnly: true,
      // Nobody writes, so all connections see the same.
      canMultiConn: true,
      isTemporary: true,
    };
    this.byName.set(name, nbdExport);
    return () => {
      this.byName.delete(name);
      this.#server?.endExport(nbdExport);
    };
  }
}
