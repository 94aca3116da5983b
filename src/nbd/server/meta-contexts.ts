// Metadata contexts: which ones an export has, and which of them a client's queries choose.
//
//   query               | LIST                       | SET
//   none                | all                        | none
//   base:               | base:allocation            | none
//   base:allocation     | itself                     | itself
//   qemu:               | all of qemu:               | none
//   qemu:dirty-bitmap:  | all dirty bitmaps          | none
//   an exact name       | itself                     | itself
//   anything else       | none                       | none
//
// The qemu: rows are QEMU's (docs/interop/nbd.rst of qemu/qemu). Specification: doc/proto.md, "Metadata querying".

import type { NbdExport, StatusContext } from "./export.js";
import { NBD_META_BASE_ALLOCATION, NBD_META_DIRTY_BITMAP_PREFIX } from "../wire/protocol.js";

export interface MetaContext {
  /** What BLOCK_STATUS chunks carry; unique within an export. */
  readonly id: number;
  readonly name: string;
  /** Undefined for base:allocation, which the device itself answers. */
  readonly source: StatusContext | undefined;
}

const WILDCARDS: ReadonlySet<string> = new Set(["base:", "qemu:", NBD_META_DIRTY_BITMAP_PREFIX]);

function contextsOf({ contexts = [] }: NbdExport): MetaContext[] {
  const allocation = { id: 0, name: NBD_META_BASE_ALLOCATION, source: undefined };
  return [allocation, ...contexts.map((source, i) => ({ id: i + 1, name: source.name, source }))];
}

export function chooseContexts(
  nbdExport: NbdExport,
  queries: readonly string[],
  isSet: boolean,
): readonly MetaContext[] {
  const all = contextsOf(nbdExport);
  if (queries.length === 0) return isSet ? [] : all;
  const wanted = new Set(queries);
  const prefixes = isSet ? [] : [...wanted].filter((query) => WILDCARDS.has(query));
  return all.filter(({ name }) => wanted.has(name) || prefixes.some((prefix) => name.startsWith(prefix)));
}
