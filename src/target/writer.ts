// A worker's door to a target, by its description's format. Runs on the worker's thread.

import { NbdTargetWriter } from "./nbd.js";
import { NullWriter } from "./null.js";
import { RbdTargetWriter } from "./rbd.js";
import { CompressingWriter } from "./qcow2/compressing.js";
import { Qcow2Writer } from "./qcow2/writer.js";
import { RepositoryWriter } from "./repository/writer.js";
import { RawWriter } from "./file/raw.js";
import { StdoutWriter } from "./stdout.js";
import type { TargetDescription } from "./target.js";
import type { TargetWriter } from "../cow/target-writer.js";

/** @param isCancelled asked while a server's answer is awaited; true ends the wait */
export function openTarget(
  description: TargetDescription,
  isCancelled: () => boolean = () => false,
): TargetWriter {
  switch (description.format) {
    case "raw":
      return new RawWriter(description);
    case "qcow2":
      return description.compression === null
        ? new Qcow2Writer(description)
        : new CompressingWriter(description, description.compression);
    case "null":
      return new NullWriter();
    case "stdout":
      return new StdoutWriter(description, isCancelled);
    case "nbd":
      return new NbdTargetWriter(description, isCancelled);
    case "rbd":
      return new RbdTargetWriter(description, isCancelled);
    case "repository":
      return new RepositoryWriter(description);
  }
}
