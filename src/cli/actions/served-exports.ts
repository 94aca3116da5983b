// What `serve` offers by NBD: its disks, the T0 views of jobs for as long as those run, and what the control socket adds
// and takes away. An export has an id, by which the control socket knows it, and a name, by which clients do; those of
// the command line and of views have the same for both.

import type { SnapshotPublisher } from "../../backup/job/snapshot.js";
import type { BlockDevice } from "../../block/device.js";
import type { ExportHost, ExportOrder, ServedExport } from "../../control/export-host.js";
import type { DiskNode } from "../../cow/disk-node.js";
import { CowcatcherError } from "../../errors.js";
import type { StatusContext } from "../../nbd/server/export.js";
import type { NbdExport, NbdServer } from "../../nbd/server/server.js";
import type { OpenedDisks } from "./opened-disks.js";

type Ending = Pick<NbdServer, "endExport" | "clientCountOf">;

interface Entry {
  readonly id: string;
  readonly nodeName: string;
  readonly nbdExport: NbdExport;
  readonly isView: boolean;
  isShuttingDown: boolean;
}

export class ServedExports implements SnapshotPublisher, ExportHost {
  /** The server looks into it for each client; it changes as jobs come and go. */
  readonly byName = new Map<string, NbdExport>();
  readonly #nodes: ReadonlyMap<string, DiskNode>;
  readonly #entries = new Map<string, Entry>();
  #server: Ending | undefined;
  #opened: OpenedDisks | undefined;
  #tellDeleted: (id: string) => void = () => undefined;

  /** @param contexts metadata contexts of each node besides base:allocation, in the nodes' order */
  constructor(nodes: ReadonlyMap<string, DiskNode>, contexts: readonly StatusContext[][] = []) {
    this.#nodes = nodes;
    for (const [name, device] of nodes) {
      this.#list(name, name, {
        name,
        description: device.name,
        device,
        readOnly: device.readOnly,
        canMultiConn: true,
        contexts: contexts[this.byName.size] ?? [],
      });
    }
  }

  /** The server that offers them, made after this map, and who opens further disks. */
  attach(server: Ending, opened?: OpenedDisks): void {
    this.#server = server;
    this.#opened = opened;
  }

  publish(name: string, device: BlockDevice, contexts: readonly StatusContext[] = []): () => void {
    if (this.byName.has(name) || this.#entries.has(name)) {
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
      contexts,
    };
    const nodeName = [...this.#nodes.keys()].find((node) => name === `${node}-snapshot`) ?? name;
    this.#list(name, nodeName, nbdExport, true);
    return () => {
      // Those that were added of it go with it.
      for (const entry of this.#entries.values()) {
        if (entry.nbdExport.device === device) this.#end(entry, undefined);
      }
    };
  }

  list(): readonly ServedExport[] {
    return [...this.#entries.values()].map(({ id, nodeName, nbdExport, isView, isShuttingDown }) => ({
      id,
      nodeName,
      name: nbdExport.name,
      isView,
      contexts: (nbdExport.contexts ?? []).map((context) => context.name),
      clientCount: this.#server?.clientCountOf(nbdExport) ?? 0,
      isShuttingDown,
    }));
  }

  add({ id, nodeName, name, description, isWritable, contexts }: ExportOrder): void {
    const view = [...this.#entries.values()].find((entry) => entry.isView && entry.id === nodeName);
    const device = view?.nbdExport.device ?? this.#nodes.get(nodeName);
    if (device === undefined) throw new Error(`no node '${nodeName}' to export`);
    const chosen = (view?.nbdExport.contexts ?? []).filter((context) => contexts.includes(context.name));
    this.#list(
      id,
      view?.nodeName ?? nodeName,
      {
        name,
        description,
        device,
        readOnly: !isWritable,
        canMultiConn: true,
        // What the empty name means stays what it was when the server began.
        isTemporary: true,
        contexts: chosen,
      },
      false,
    );
  }

  remove(id: string, closesDisk: boolean): void {
    const entry = this.#entries.get(id);
    if (entry !== undefined) this.#end(entry, closesDisk ? entry.nodeName : undefined);
  }

  openDisk(...args: Parameters<OpenedDisks["open"]>): Promise<void> {
    if (this.#opened === undefined) throw new Error("nobody opens disks here");
    return this.#opened.open(...args);
  }

  isOpened(name: string): boolean {
    return this.#opened?.has(name) === true;
  }

  onDeleted(listener: (id: string) => void): void {
    this.#tellDeleted = listener;
  }

  #list(id: string, nodeName: string, nbdExport: NbdExport, isView = false): void {
    this.byName.set(nbdExport.name, nbdExport);
    this.#entries.set(id, { id, nodeName, nbdExport, isView, isShuttingDown: false });
  }

  #end(entry: Entry, diskToClose: string | undefined): void {
    if (entry.isShuttingDown) return;
    entry.isShuttingDown = true;
    this.byName.delete(entry.nbdExport.name);
    void this.#outlive(entry, diskToClose);
  }

  async #outlive({ id, nbdExport }: Entry, diskToClose: string | undefined): Promise<void> {
    if (this.#server !== undefined && this.#server.clientCountOf(nbdExport) > 0) {
      await this.#server.endExport(nbdExport);
    }
    if (diskToClose !== undefined) await this.#opened?.close(diskToClose);
    this.#entries.delete(id);
    this.#tellDeleted(id);
  }
}
