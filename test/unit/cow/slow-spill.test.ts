// A spill whose storage answers when the test says so: whom that holds up, and for how long.

import { describe, expect, it } from "vitest";
import { BLOCK_BYTES, geometryOf } from "../../../src/cow/geometry.js";
import { Interceptor } from "../../../src/cow/interceptor.js";
import { createSharedState, CTL_SPILL_BLOCKS, SPILLED } from "../../../src/cow/shared.js";
import { SpillBitmaps, spillBitmapBytes, type SpillPlace } from "../../../src/cow/spill.js";

import type { CowcatcherError } from "../../../src/errors.js";
import { ColdDisk, MiB, turns } from "../../support/cow-engine.js";

const CLUSTER = 65536;

class SlowSpill implements SpillPlace {
  readonly path = "spill";
  readonly answers: { fulfil: () => void; reject: (error: Error) => void }[] = [];
  isAbandoned = false;

  constructor(readonly bitmaps: SpillBitmaps) {}

  readBitmap(chunk: number, bitmap: Uint8Array): void {
    this.bitmaps.read(chunk, bitmap);
  }

  writeBitmap(chunk: number, bitmap: Uint8Array): void {
    this.bitmaps.write(chunk, bitmap);
  }

  writeBlocks(): Promise<void> {
    return new Promise((fulfil, reject) => this.answers.push({ fulfil, reject }));
  }

  readBytes(): Promise<void> {
    return Promise.reject(new Error("nobody reads here"));
  }

  abandon(): void {
    this.isAbandoned = true;
    for (const { fulfil } of this.answers) fulfil();
  }
}

/** A clock that stands until it is moved; who sleeps is woken then. */
class Clock {
  #ms = 0;
  #sleepers: { endMs: number; wake: () => void }[] = [];

  nowMs(): number {
    return this.#ms;
  }

  sleep(ms: number): Promise<void> {
    return new Promise((wake) => this.#sleepers.push({ endMs: this.#ms + ms, wake }));
  }

  async pass(ms: number): Promise<void> {
    this.#ms += ms;
    const due = this.#sleepers.filter(({ endMs }) => endMs <= this.#ms);
    this.#sleepers = this.#sleepers.filter(({ endMs }) => endMs > this.#ms);
    for (const { wake } of due) wake();
    await turns(3);
  }
}

function make(onCbwError: "break-snapshot" | "break-guest-write") {
  const geometry = geometryOf(4 * MiB);
  const bufferBytes = CLUSTER;
  const shared = createSharedState(geometry, new SharedArrayBuffer(bufferBytes), bufferBytes);
  const spill = new SlowSpill(new SpillBitmaps(new SharedArrayBuffer(spillBitmapBytes(geometry)), geometry));
  const clock = new Clock();
  const broken: CowcatcherError[] = [];
  const interceptor = new Interceptor({
    shared,
    image: new ColdDisk(4 * MiB),
    openSpill: () => spill,
    spillLimitBytes: 4 * MiB,
    policy: { onBufferFull: "spill", onCbwError, guestTimeoutMs: 1_000 },
    onBroken: (error) => broken.push(error),
    recheckMs: 100,
    clock,
  });
  return { shared, spill, clock, broken, interceptor };
}

/** More than the buffer holds. */
const WRITE_BYTES = 2 * CLUSTER;

async function stateOf(write: Promise<void> | undefined): Promise<string> {
  const settled = Promise.resolve(write).then(
    () => "done",
    (error: unknown) => `failed: ${(error as CowcatcherError).code}`,
  );
  return Promise.race([settled, turns(3).then(() => "waits")]);
}

describe("a guest write whose capture goes to a slow spill", () => {
  it("waits for it, and no longer", async () => {
    const { shared, spill, interceptor } = make("break-snapshot");
    const write = interceptor.beforeWrite(0, WRITE_BYTES) ?? undefined;
    expect(await stateOf(write)).toBe("waits");
    for (const { fulfil } of spill.answers) fulfil();
    expect(await stateOf(write)).toBe("done");
    expect(shared.chunkWords[0] & SPILLED).toBe(SPILLED);
    expect(shared.control[CTL_SPILL_BLOCKS]).toBe(WRITE_BYTES / BLOCK_BYTES);
  });

  it("does not hold up one that finds room in the buffer", async () => {
    const { interceptor } = make("break-snapshot");
    const write = interceptor.beforeWrite(0, WRITE_BYTES) ?? undefined;
    expect(await stateOf(write)).toBe("waits");
    expect(interceptor.beforeWrite(2 * MiB, BLOCK_BYTES)).toBeUndefined();
  });

  it("goes on at its limit, without the backup", async () => {
    const { spill, clock, broken, interceptor } = make("break-snapshot");
    const write = interceptor.beforeWrite(0, WRITE_BYTES) ?? undefined;
    await clock.pass(900);
    expect(await stateOf(write)).toBe("waits");
    await clock.pass(200);
    expect(await stateOf(write)).toBe("done");
    expect(broken.map(({ code }) => code)).toEqual(["GUEST_TIMEOUT"]);
    expect(interceptor.detached).toBe(true);
    expect(spill.isAbandoned).toBe(true);
    // Nothing of it goes on that somebody would have to wait for.
    await interceptor.idle();
  });

  it("fails at its limit where the guest's write is to break, and the capture is made all the same", async () => {
    const { shared, spill, clock, broken, interceptor } = make("break-guest-write");
    const write = (interceptor.beforeWrite(0, WRITE_BYTES) ?? undefined)?.then(
      () => "done",
      (error: unknown) => `failed: ${(error as CowcatcherError).code}`,
    );
    await clock.pass(1_100);
    expect(await write).toBe("failed: GUEST_TIMEOUT");
    expect(broken).toEqual([]);
    for (const { fulfil } of spill.answers) fulfil();
    await turns(3);
    expect(shared.chunkWords[0] & SPILLED).toBe(SPILLED);
    expect(interceptor.beforeWrite(0, WRITE_BYTES)).toBeUndefined();
  });

  it("fails with the spill's error, or goes on without the backup", async () => {
    for (const policy of ["break-snapshot", "break-guest-write"] as const) {
      const { spill, broken, interceptor } = make(policy);
      const write = interceptor.beforeWrite(0, WRITE_BYTES) ?? undefined;
      await turns(3);
      spill.answers[0].reject(Object.assign(new Error("EIO"), { code: "EIO" }));
      for (const { fulfil } of spill.answers.slice(1)) fulfil();
      expect(await stateOf(write)).toBe(policy === "break-snapshot" ? "done" : "failed: IO");
      expect(broken).toHaveLength(policy === "break-snapshot" ? 1 : 0);
    }
  });

  it("goes on at once when the job ends", async () => {
    const { interceptor } = make("break-snapshot");
    const write = interceptor.beforeWrite(0, WRITE_BYTES) ?? undefined;
    expect(await stateOf(write)).toBe("waits");
    interceptor.detach();
    expect(await stateOf(write)).toBe("done");
  });
});
