// A worker's door to a target, by its description's format. Runs on the worker's thread.

import { NullWriter } from "./null.js";
import { Qcow2Writer } from "./qcow2-writer.js";
import { RawWriter } from "./raw.js";
import type { TargetDescription, TargetWriter } from "./target.js";

export function openTarget(description: TargetDescription): TargetWriter {
  switch (description.format) {
    case "raw":
      return new RawWriter(description);
    case "qcow2":
      return new Qcow2Writer(description);
    case "null":
      return new NullWriter();
  }
}
