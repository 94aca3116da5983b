// What the control socket knows of the exports of its server, and may ask for. The NBD side implements it.

import type { ImageFormat } from "../block/format.js";

export interface ServedExport {
  id: string;
  /** The disk that it shows, or whose T0 view. */
  nodeName: string;
  /** What clients ask for. */
  name: string;
  /** Of a job's T0 view: it goes with the job. */
  isView: boolean;
  /** Names of its metadata contexts besides base:allocation. */
  contexts: readonly string[];
  clientCount: number;
  isShuttingDown: boolean;
}

export interface ExportOrder {
  id: string;
  /** A disk of the server, or the name of a view's export. */
  nodeName: string;
  name: string;
  description: string;
  isWritable: boolean;
  /** Of the view's. */
  contexts: readonly string[];
}

export interface ExportHost {
  list(): readonly ServedExport[];
  /** Its names are nobody else's. Synchronous. */
  add(order: ExportOrder): void;
  /**
   * Nobody gets in any more; clients that are in are shut out, at the latest after a while.
   * @param closesDisk it is the last one of a disk that was opened by openDisk, which is closed when they are gone
   */
  remove(id: string, closesDisk: boolean): void;
  /** @throws CowcatcherError as openImage; LOCKED, NOT_FOUND, FORMAT, IO */
  openDisk(name: string, place: { path: string; format: ImageFormat; readOnly: boolean }): Promise<void>;
  /** The disk was opened by openDisk. */
  isOpened(name: string): boolean;
  /** Called when an export is gone, with its id. */
  onDeleted(listener: (id: string) => void): void;
}
