// What a disk knows of whoever keeps track of its changes (src/tracking): it is asked before each write.

import type { Completion } from "../block/device.js";

export interface WriteTracker {
  /**
   * Before a write, trim or write of zeroes of the range (bytes, within the disk): undefined when it may go on at once.
   * Else it is to ask again, from the top, when the promise is fulfilled; that never rejects. Main thread only.
   */
  beforeWrite(offsetBytes: number, lengthBytes: number): Completion;
  /** Before a flush, and when a write or flush is done that was not done at once. */
  touched(): void;
}
