// A check with or without repair, phase by phase, on a file that is open.
//
//   snapshot table ─► references (check/tables.ts) ─► refcounts compared (check/refcounts.ts)
//        ─► refcounts corrected in place, or a new structure (repair-rebuild.ts) ─► sync
//        ─► COPIED flags compared and corrected ─► sync ─► header: dirty and corrupt bits ─► sync
//
// Order and safety. A repair never moves or writes guest data, nor a cluster that a table refers to, except to correct
// an entry in its place; what is new goes where nothing is. Refcounts are right on disk before a COPIED flag relies on
// them. The bits that say "do not trust this image" go last. So whatever the moment at which a repair is killed or the
// power fails, each value on disk is either the old one or the right one, and the next repair finds the rest.
//
// What is not repaired, because nobody can know what was there: references that lead out of the file or to no cluster
// boundary, reserved bits, two owners of one cluster (its refcount becomes two, so that a write copies it). Snapshots
// are never discarded.
//
// Counts are QEMU's. Where qemu-img builds a new structure because of a refcount that is zero, the block that holds
// it is corrected in place here if it is sound: the result is the same, and the file does not grow.

import { CowcatcherError } from "../../../errors.js";
import { RefcountBlocks } from "./blocks.js";
import { type Comparison, CopiedFlags, compareRefcounts, countBlocks } from "./refcounts.js";
import { type CheckCounts, CheckState, type RepairMode } from "./state.js";
import { type CheckProgress, countReferences } from "./tables.js";
import type { QcowFile } from "../format/file.js";
import {
  FIELD_OFFSET,
  INCOMPATIBLE_CORRUPT,
  INCOMPATIBLE_DIRTY,
  MAX_SNAPSHOT_EXTRA_BYTES,
  type Qcow2Header,
} from "../format/header.js";
import { MetadataRanges } from "./repair-ranges.js";
import { rebuildRefcounts } from "./repair-rebuild.js";
import {
  REQUIRED_EXTRA_BYTES,
  readSnapshotTable,
  serialiseSnapshotTable,
  type SnapshotTable,
} from "../format/snapshots.js";

const KNOWN_AUTOCLEAR = 3n;

export interface CheckFindings {
  counts: CheckCounts;
  messages: string[];
  /** End of the last host cluster in use, in bytes. */
  imageEndOffset: number;
}

/**
 * One pass over an image's metadata. With `repair` the file is written and `header` kept in step with it.
 * @throws CowcatcherError FORMAT (a table leads nowhere; `repair` "leaks" where only "all" helps), LIMIT, IO, NO_SPACE.
 */
export async function checkMetadata(
  file: QcowFile,
  header: Qcow2Header,
  repair?: RepairMode,
  onProgress?: CheckProgress,
): Promise<CheckFindings> {
  if (repair !== undefined) await clearUnknownAutoclear(file, header);
  const findings = await checkAndRepair(file, header, repair, onProgress);
  const { counts } = findings;
  if (repair === undefined || counts.checkErrors > 0 || counts.corruptions > 0) return findings;
  await clearMarks(file, header);
  return findings;
}

async function checkAndRepair(
  file: QcowFile,
  header: Qcow2Header,
  wanted: RepairMode | undefined,
  onProgress: CheckProgress | undefined,
): Promise<CheckFindings> {
  const state = new CheckState(file, header, wanted);
  const snapshots = readSnapshots(state);
  const brokenSnapshots = judgeSnapshots(state, snapshots);
  await countReferences(state, snapshots, { countRefcountTable: true, onProgress });
  // What was not walked has no references, and would be freed for a leak.
  const repair = state.isIncomplete ? undefined : wanted;
  const blocks = await RefcountBlocks.open(state);
  countBlocks(state, blocks);
  const before = { counts: { ...state.counts }, messageCount: state.messages.length };
  let comparison = await compareRefcounts(state, blocks, undefined);
  const { counts } = state;
  if (repair === "all" && (state.mustRebuild || state.isStructureShared || brokenSnapshots > 0)) {
    await countGrownBlocks(state, blocks);
    return rebuild(state, snapshots, before.counts.checkErrors, brokenSnapshots > 0);
  }
  const isBeyondLeaks = state.mustRebuild || comparison.wrongZeroCount > 0;
  if (repair === "leaks" && (isBeyondLeaks || (state.isStructureShared && counts.leaks > 0))) {
    throw onlyAllHelps(file.name);
  }
  if (repair !== undefined && counts.leaks + counts.corruptions > 0) {
    Object.assign(counts, before.counts);
    state.messages.length = before.messageCount;
    comparison = await compareRefcounts(state, blocks, repair);
    await file.sync();
  }
  const isSafe = counts.checkErrors + counts.corruptions + counts.leaks === 0;
  const mayCorrect = repair === "all" || (repair === "leaks" && isSafe);
  return finish(state, snapshots, blocks, comparison, mayCorrect);
}

async function finish(
  state: CheckState,
  snapshots: SnapshotTable,
  blocks: RefcountBlocks,
  { singles, imageEndOffset }: Comparison,
  mayCorrect: boolean,
): Promise<CheckFindings> {
  const fixedBefore = state.counts.corruptionsFixed;
  const ranges = mayCorrect ? new MetadataRanges(state, snapshots) : null;
  await new CopiedFlags(state, blocks, singles, ranges).check();
  if (state.counts.corruptionsFixed > fixedBefore) await state.file.sync();
  return { counts: state.counts, messages: state.messages, imageEndOffset };
}

/** Version 3 asks for the disk's size in each entry; more extra data than the limit can be cut off. */
function judgeSnapshots(state: CheckState, { entries }: SnapshotTable): number {
  let broken = 0;
  entries.forEach(({ extraBytes }, index) => {
    if (extraBytes <= MAX_SNAPSHOT_EXTRA_BYTES) return;
    state.corruption(`snapshot table entry ${index} has ${extraBytes} bytes of extra data`);
    broken++;
  });
  entries.forEach(({ extraBytes }, index) => {
    if (state.header.version < 3 || extraBytes >= REQUIRED_EXTRA_BYTES) return;
    state.corruption(`snapshot table entry ${index} is incomplete`);
    broken++;
  });
  return broken;
}

function readSnapshots(state: CheckState): SnapshotTable {
  const read = (offsetBytes: number, lengthBytes: number): DataView =>
    state.readNow(offsetBytes, lengthBytes);
  return readSnapshotTable(state.header, read, state.name, state.repairsErrors);
}

/**
 * qemu-img makes the file long enough for a block that is outside it, and then finds the block's own refcount wrong
 * where it is. The file stays as it is here; only the count is taken over.
 */
async function countGrownBlocks(state: CheckState, blocks: RefcountBlocks): Promise<void> {
  for (let index = 0; index < blocks.entryCount; index++) {
    const offset = blocks.offsetAt(index);
    if (blocks.placeOf(index) !== "outside" || offset + state.clusterSizeBytes >= 2 ** 63) continue;
    const cluster = offset / state.clusterSizeBytes;
    await blocks.load(cluster);
    const refcount = blocks.get(cluster);
    if (refcount < 1) state.corruption(`cluster ${cluster} refcount=${refcount} reference=1`);
  }
}

async function rebuild(
  old: CheckState,
  snapshots: SnapshotTable,
  checkErrors: number,
  rewriteSnapshots: boolean,
): Promise<CheckFindings> {
  const { file, header } = old;
  old.note("Rebuilding refcount structure");
  const keptSnapshots = rewriteSnapshots ? { ...snapshots, lengthBytes: 0 } : snapshots;
  const content = new CheckState(file, header);
  await countReferences(content, keptSnapshots, { countRefcountTable: false });
  const table = rewriteSnapshots ? serialiseSnapshotTable(snapshots.entries, header.sizeBytes) : null;
  await rebuildRefcounts(content, table, old.references);

  const state = new CheckState(file, header);
  const newSnapshots = readSnapshots(state);
  judgeSnapshots(state, newSnapshots);
  await countReferences(state, newSnapshots, { countRefcountTable: true });
  const blocks = await RefcountBlocks.open(state);
  countBlocks(state, blocks);
  const comparison = await compareRefcounts(state, blocks, undefined);
  const { counts } = state;
  const fixed = (before: number, after: number): number => Math.max(0, before - after);
  counts.checkErrors += checkErrors;
  counts.corruptionsFixed = old.counts.corruptionsFixed + fixed(old.counts.corruptions, counts.corruptions);
  counts.leaksFixed = old.counts.leaksFixed + fixed(old.counts.leaks, counts.leaks);
  const findings = await finish(state, newSnapshots, blocks, comparison, true);
  return { ...findings, messages: [...old.messages, ...state.messages] };
}

function onlyAllHelps(name: string): CowcatcherError {
  return new CowcatcherError({
    code: "FORMAT",
    object: name,
    problem: "leaks cannot be repaired while refcounts are missing",
    hint: "give --repair all",
  });
}

/** Nobody keeps them valid from here on. */
async function clearUnknownAutoclear(file: QcowFile, header: Qcow2Header): Promise<void> {
  if (header.version < 3 || (header.autoclearFeatures & ~KNOWN_AUTOCLEAR) === 0n) return;
  header.autoclearFeatures &= KNOWN_AUTOCLEAR;
  await writeField(file, FIELD_OFFSET.autoclearFeatures, header.autoclearFeatures);
}

async function clearMarks(file: QcowFile, header: Qcow2Header): Promise<void> {
  const marks = INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT;
  if ((header.incompatibleFeatures & marks) === 0n) return;
  await file.sync();
  header.incompatibleFeatures &= ~marks;
  await writeField(file, FIELD_OFFSET.incompatibleFeatures, header.incompatibleFeatures);
}

async function writeField(file: QcowFile, offsetBytes: number, value: bigint): Promise<void> {
  const bytes = new Uint8Array(8);
  new DataView(bytes.buffer).setBigUint64(0, value);
  await file.write(bytes, 0, bytes.length, offsetBytes);
  await file.sync();
}
