// Breaks the copy-before-write engine on purpose, one rule at a time, and shows that the model test notices:
// npm run test:mutants. Each mutant is a copy of the project's sources with one line changed. Arguments choose
// those whose rule has one of them: npm run test:mutants -- spill
import { spawnSync } from "node:child_process";
import { cpSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";

const MUTANTS = [
  {
    rule: "1: capture before the write",
    file: "src/cow/interceptor.ts",
    from: 'if (this.#allDone(from, to)) return "done";\n    const region',
    to: 'if (this.#allDone(from, to) || from % 3 === 0) return "done";\n    const region',
  },
  {
    rule: "1: only blocks that a capture holds are held",
    file: "src/cow/capture-store.ts",
    from: "this.#heldBlocks.add(chunk, this.#blockOf(chunk, from), this.#endBlockOf(chunk, to));",
    to: "this.#heldBlocks.add(chunk, this.#blockOf(chunk, from), this.#endBlockOf(chunk, to) + 1);",
  },
  {
    rule: "1: the quick way through is for writes of which every block is held",
    file: "src/cow/held-blocks.ts",
    from: "if ((this.#bits[base + word] & wanted) !== wanted) return false;",
    to: "if ((this.#bits[base + word] & wanted) === 0) return false;",
  },
  {
    rule: "1: a chunk has one owner at a time",
    file: "src/cow/shared.ts",
    from: "if ((word & OWNER_MASK) !== 0) return false;",
    to: "if ((word & OWNER_MASK) !== 0 && owner !== OWNER_MAIN) return false;",
  },
  {
    rule: "2: DONE before the write to the target, not after it",
    file: "src/cow/chunk-copy.ts",
    from: "if (!this.#unbuffered && !(yield* this.#finishReading(chunk))) return;",
    to: "yield* this.#claim(chunk); this.#detachCaptures(chunk); this.#detachSpilled(chunk);",
    also: [
      {
        from: "if (this.#unbuffered && !(yield* this.#finishReading(chunk))) return;",
        to: "shared.release(chunk, 0, 0); if (!(yield* this.#finishReading(chunk))) return;",
      },
    ],
  },
  {
    rule: "2: who waits is woken",
    file: "src/cow/shared.ts",
    from: "if ((word & WAITING) !== 0) Atomics.notify(this.chunkWords, chunk);",
    to: "",
  },
  {
    rule: "3: captured data goes over what was read",
    file: "src/cow/chunk-copy.ts",
    from: "    yield* this.#readMissing(chunk);\n    yield* this.#release(chunk);\n    yield STEP;",
    to: "    yield STEP;",
    also: [
      {
        from: "    this.#takeSpilled(chunk);\n    this.#recordDigests(chunk);",
        to: "    this.#takeSpilled(chunk);\n    yield* this.#readMissing(chunk);",
      },
    ],
  },
  {
    rule: "3: captures made while a worker reads are part of the backup",
    file: "src/cow/interceptor.ts",
    from: "if (this.#allDone(from, to)) {",
    to: "if (this.#allDone(from, to) || shared.clusterStates[Math.floor(from / shared.geometry.clusterBytes)] === 1) {",
  },
  {
    rule: "3: captures of other clusters stay on the list",
    file: "src/cow/chunk-copy.ts",
    from: "if (this.#isTaken(captureStart(shared.captureInfo[capture]))) {",
    to: "if (captureStart(shared.captureInfo[capture]) >= 0) {",
  },
  {
    rule: "3: once: clusters that are done are not taken again",
    file: "src/cow/chunk-copy.ts",
    from: "if (state !== CAPTURED && (state !== PENDING || capturedOnly)) continue;",
    to: "if (state === READING) continue;",
  },
  {
    rule: "3: spilled blocks are part of the backup",
    file: "src/cow/chunk-copy.ts",
    from: "    this.#takeSpilled(chunk);\n",
    to: "",
  },
  {
    rule: "3: a region is a hole only if all of it is",
    file: "src/cow/drain.ts",
    from: "hole = extent.zero && extent.lengthBytes >= length;",
    to: "hole = extent.zero;",
  },
  {
    rule: "3: top: a cluster of which the top layer has a part is copied whole",
    file: "src/cow/chunk-copy.ts",
    from: 'if (part.lengthBytes < lengthBytes) return "both";',
    to: 'if (part.lengthBytes < lengthBytes) return "below";',
  },
  {
    rule: "3: top: what lies below is not written",
    file: "src/cow/chunk-copy.ts",
    from: "this.#copied[i] = this.#taken[i] && !isBelow ? 1 : 0;",
    to: "this.#copied[i] = this.#taken[i] ?? 0;",
  },
  {
    rule: "3: top: an empty region of several layers is looked at by cluster",
    file: "src/cow/drain.ts",
    from: 'if (layers === "own") {',
    to: 'if (layers !== "below") {',
  },
  {
    rule: "3: slots are given back when they have been copied",
    file: "src/cow/chunk-copy.ts",
    from: "blockCount += count;\n      last = capture;",
    to: "blockCount += count;\n      last = first;",
  },
  {
    rule: "5: no write is in flight at T0",
    file: "src/cow/disk-node.ts",
    from: "if (this.#inFlight > 0) {",
    to: "if (this.#inFlight > 1e9) {",
  },
  {
    rule: "5: a write that starts after T0 is intercepted",
    file: "src/cow/disk-node.ts",
    from: "if (wait) return wait.then(() => this.write(buffer, bufferOffset, lengthBytes, offsetBytes));",
    to: "if (wait) return wait.then(() => this.image.write(buffer, bufferOffset, lengthBytes, offsetBytes));",
  },
  {
    rule: "5: a write that waited for who keeps track asks again",
    file: "src/cow/disk-node.ts",
    from: "const tracked = this.tracker?.beforeWrite(offsetBytes, lengthBytes);",
    to: "const self = this as { asked?: number }; const tracked = self.asked === offsetBytes ? undefined : this.tracker?.beforeWrite(offsetBytes, lengthBytes); self.asked = offsetBytes;",
  },
  {
    rule: "5: a write that waits for T0 is not noted before",
    file: "src/cow/disk-node.ts",
    from: "return this.#writes.gate ?? this.#intercept(offsetBytes, lengthBytes);",
    to: "return this.tracker?.beforeWrite(offsetBytes, lengthBytes) ?? this.#writes.gate ?? this.#intercept(offsetBytes, lengthBytes);",
  },
  {
    rule: "5: an epoch in which anything was written ends at T0",
    file: "src/tracking/epochs.ts",
    from: "if (over.isEmpty) return",
    to: "if (over.bits.count() < 3) return",
  },
  {
    rule: "snapshot: what was captured during a slow read goes over what was read",
    test: "test/model/snapshot.test.ts",
    file: "src/cow/snapshot-device.ts",
    from: "return allDone(pending).then(() => this.#layCaptures(buffer, bufferOffset, from, to));",
    to: "return allDone(pending);",
  },
  {
    rule: "snapshot: once it is lost, nothing read meanwhile is given out",
    test: "test/model/snapshot.test.ts",
    file: "src/cow/snapshot-device.ts",
    from: "to: number): Completion {\n    this.#requireIntact(from);\n    if (!this.#findPlaces",
    to: "to: number): Completion {\n    if (!this.#findPlaces",
  },
  {
    rule: "snapshot: a status that comes late says nothing of what was captured meanwhile",
    test: "test/unit/cow/snapshot-device.test.ts",
    file: "src/cow/snapshot-device.ts",
    from: "const bytes = Math.min(answer.lengthBytes, this.#unchangedBytes(offsetBytes, unchangedBytes));",
    to: "const bytes = answer.lengthBytes;",
  },
  {
    rule: "snapshot: buffer and spill are kept until no reader uses them",
    test: "test/model/snapshot.test.ts",
    file: "src/cow/snapshot-device.ts",
    from: "if (this.#inFlight === 0) return;\n    await",
    to: "if (this.#inFlight >= 0) return;\n    await",
  },
  {
    rule: "claims: b1 before b2",
    test: "test/model/repository/claims.test.ts",
    file: "src/repository/work/claims.ts",
    from: "await this.#put(batch.map(({ id }) => ({ id, generation: 0 })));\n        await this.#condemned.refresh(this.#store);",
    to: "await this.#condemned.refresh(this.#store);\n        await this.#put(batch.map(({ id }) => ({ id, generation: 0 })));",
  },
  {
    rule: "claims: b3, a condemned name is not relied on",
    test: "test/model/repository/claims.test.ts",
    file: "src/repository/backup/chunk-writer.ts",
    from: "if (!condemned.isCondemned(id, generation)) return",
    to: "if (!condemned.isCondemned(id, generation) || true) return",
  },
  {
    rule: "claims: b3, nor is one that the parent had",
    test: "test/unit/repository/condemned.test.ts",
    file: "src/repository/backup/parent.ts",
    from: "if (!condemned.isCondemned(chunk.id, chunk.generation)) known.add(chunk.id);",
    to: "if (!condemned.isCondemned(chunk.id, chunk.generation) || true) known.add(chunk.id);",
  },
  {
    rule: "claims: p1 before p2",
    test: "test/model/repository/claims.test.ts",
    file: "src/repository/work/condemned.ts",
    from: "await store.put(list, encodeIdList(candidates), { durable: true });\n  const claimed = await readClaims(options);",
    to: "const claimed = await readClaims(options);\n  await store.put(list, encodeIdList(candidates), { durable: true });",
  },
  {
    rule: "claims: p2, what is claimed is spared",
    test: "test/model/repository/claims.test.ts",
    file: "src/repository/work/condemned.ts",
    from: "({ id }) => !claimed.has(id) && !isMarked(id)",
    to: "({ id }) => !isMarked(id)",
  },
  {
    rule: "claims: p2 before p3",
    test: "test/model/repository/claims.test.ts",
    file: "src/repository/work/condemned.ts",
    from: "const claimed = await readClaims(options);\n  await addNewMarks();",
    to: "await addNewMarks();\n  const claimed = await readClaims(options);",
  },
  {
    rule: "claims: r3, who was taken for dead has no backup",
    test: "test/model/repository/claims.test.ts",
    file: "src/repository/backup/session.ts",
    from: "if (await isRevoked(store, this.#run.id)) {",
    to: "if ((await isRevoked(store, this.#run.id)) && false) {",
  },
  {
    rule: "claims: j2, whose manifest is there is not dead",
    test: "test/model/repository/claims.test.ts",
    file: "src/repository/work/condemned.ts",
    from: "if (!(await mayBeGood(run, options))) {",
    to: "{",
  },
  {
    rule: "claims: r4, the record goes before the draft",
    test: "test/model/repository/claims.test.ts",
    file: "src/repository/work/runs.ts",
    from: "await this.#store.delete(runObject(this.id));\n    await this.#store.delete(draftObject(this.id));",
    to: "await this.#store.delete(draftObject(this.id));\n    await this.#store.delete(runObject(this.id));",
  },
];

const TRACKING_MUTANTS = [
  {
    rule: "tracking: the intent is durable before the data is written",
    file: "src/tracking/tracker.ts",
    from: "if (hot !== null && !hot.areHot(firstExtent, lastExtent)) return hot.request(firstExtent, lastExtent);",
    to: "if (hot !== null && !hot.areHot(firstExtent, lastExtent)) void hot.request(firstExtent, lastExtent);",
  },
  {
    rule: "tracking: bits are synced before their extent is evicted",
    file: "src/tracking/epochs.ts",
    from: "    await this.#active.sync();\n",
    to: "",
  },
  {
    rule: "tracking: an extent with a new bit since the sync began stays",
    file: "src/tracking/hot-set.ts",
    from: "touched < syncedAt && !keep.has(extent)",
    to: "!keep.has(extent)",
    test: "test/unit/tracking/hot-set.test.ts",
  },
  {
    rule: "tracking: bits alone are not believed in another boot",
    file: "src/tracking/recovery.ts",
    from: "if (head.bootId === boot.id) return { ...kept",
    to: "if (head.bootId !== '') return { ...kept",
  },
  {
    rule: "tracking: what a disk has grown by has changed",
    file: "src/tracking/recovery.ts",
    from: "bits?.setBytes(head.sizeBytes, sizeBytes - head.sizeBytes);",
    to: "",
  },
  {
    rule: "tracking: the image is flushed before a checkpoint has its name",
    file: "src/tracking/tracker.ts",
    from: "await this.#options.flushImage();",
    to: "",
  },
  {
    rule: "tracking: the boundary of a backup that runs is kept",
    file: "src/tracking/epochs.ts",
    from: "    store.hold(epoch);",
    to: "",
  },
  {
    rule: "tracking: what was found is durable before the log that told of it goes",
    file: "src/tracking/opening.ts",
    from: "await ActiveEpoch.write(folder, head, epoch, found.active);",
    to: "await ActiveEpoch.write(folder, head, epoch, new Bits(options.image.sizeBytes, base.granularityBytes));",
  },
  {
    rule: "tracking: a backup that is being prepared learns of the epochs that end meanwhile",
    file: "src/tracking/epochs.ts",
    from: "for (const bits of this.#followers) bits.or(over.bits);",
    to: "",
  },
  {
    rule: "tracking: a write that follows a killed server is another's",
    file: "src/tracking/pulse.ts",
    from: "if (!pulse.writing) return pulse.changedNs !== now.changedNs;",
    to: "if (!pulse.writing) return false;",
  },
  {
    rule: "tracking: the record says writing before a write is issued",
    file: "src/tracking/pulse.ts",
    from: "this.#isWriting = true;\n    this.#writeNow();",
    to: "this.#isWriting = true;",
    test: "test/unit/tracking/pulse.test.ts",
  },
  {
    rule: "tracking: neighbours that are taken along are in the log, too",
    file: "src/tracking/hot-set.ts",
    from: 'await this.#append("add", [...cold, ...neighbours]);',
    to: 'await this.#append("add", cold);',
    test: "test/unit/tracking/hot-set.test.ts",
  },
  {
    rule: "tracking: bits that take their time are set while their extents are hot",
    file: "src/tracking/tracker.ts",
    from: "() => hot?.touchHot(firstExtent, lastExtent) ?? true",
    to: "() => true",
  },
  {
    rule: "tracking: nor are they where their extents were evicted meanwhile",
    file: "src/tracking/active-epoch.ts",
    from: "if (isAllowed()) bits.set(first, last);",
    to: "bits.set(first, last);",
    test: "test/unit/tracking/active-epoch.test.ts",
  },
  {
    rule: "tracking: writes of others are in the result",
    file: "src/tracking/recovery.ts",
    from: "active.or(others);",
    to: "",
  },
  {
    rule: "tracking: epochs on both sides of a checkpoint are never merged",
    file: "src/tracking/epoch-store.ts",
    from: "before < epoch && epoch <= after;",
    to: "epoch === after;",
    test: "test/unit/tracking/epoch-store.test.ts",
  },
  {
    rule: "tracking: what a checkpoint keeps besides its epochs is part of it",
    file: "src/tracking/epoch-store.ts",
    from: "into.or(bits);\n      }",
    to: "}",
  },
  {
    rule: "tracking: what a change that can be undone has replaced is kept",
    file: "src/tracking/epoch-store.ts",
    from: "keptBits !== undefined && !this.#heldFiles.has(keptBits)",
    to: "keptBits !== undefined",
  },
].map((mutant) => ({ test: "test/model/tracking.test.ts", ...mutant }));
MUTANTS.push(...TRACKING_MUTANTS);

const chosen = process.argv.length > 2 ? process.argv.slice(2) : [""];
const PARTS = [
  "src",
  "workers",
  "bench",
  "test",
  "docs",
  "package.json",
  "tsconfig.json",
  "vitest.config.ts",
  "vitest.campaigns.ts",
];
let survivors = 0;
/** Test files that pass without a mutant: of one that does not, "caught" would mean nothing. */
const sound = new Set();
for (const mutant of MUTANTS.filter(({ rule }) => chosen.some((part) => rule.includes(part)))) {
  const test = mutant.test ?? "test/model/cow.test.ts";
  if (!sound.has(test)) {
    const { failed, output } = runIn(undefined, test);
    if (failed) throw new Error(`${test} fails without any mutant:\n${output.slice(-4000)}`);
    sound.add(test);
  }
  const { failed, output } = runIn(mutant, test);
  if (!failed) survivors++;
  const reason = /Error.*?: (.*)/.exec(output)?.[1] ?? "failed";
  console.log(`${failed ? "caught  " : "SURVIVED"}  ${mutant.rule}${failed ? `  →  ${reason}` : ""}`);
}
process.exitCode = survivors === 0 ? 0 : 1;

/** Runs one test file in a copy of the tree that has the mutant. */
function runIn(mutant, test) {
  const directory = mkdtempSync(join(process.cwd(), ".mutant-"));
  try {
    for (const part of PARTS) cpSync(part, join(directory, part), { recursive: true });
    symlinkSync(join(process.cwd(), "node_modules"), join(directory, "node_modules"));
    if (mutant !== undefined) apply(join(directory, mutant.file), mutant);
    const { status, stdout, stderr } = spawnSync("npx", ["vitest", "run", test], {
      cwd: directory,
      encoding: "utf8",
      env: {
        ...process.env,
        COW_MODEL_SCHEDULES: "3000",
        TRACKING_MODEL_SCHEDULES: "300",
        COWCATCHER_CLAIM_SEEDS: "3000",
      },
    });
    return { failed: status !== 0, output: `${stdout}${stderr}`.replace(/\u001b\[[0-9;]*m/g, "") };
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}

function apply(file, { from, to, also = [] }) {
  let text = readFileSync(file, "utf8");
  for (const change of [{ from, to }, ...also]) {
    if (text.split(change.from).length !== 2) throw new Error(`${file}: does not hold once: ${change.from}`);
    text = text.replace(change.from, () => change.to);
  }
  writeFileSync(file, text);
}
