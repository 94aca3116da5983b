// A job that ends while a capture still reads from a slow disk: the buffer and the spill file's descriptor are
// about to be another job's, or another file's.
import { closeSync, mkdtempSync, openSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, expect, it } from "vitest";
import { Interceptor } from "../../../src/cow/interceptor.js";
import { BLOCK_BYTES, geometryOf, SLOT_BYTES } from "../../../src/cow/geometry.js";
import { createSharedState, OWNER_MASK, type SharedState } from "../../../src/cow/shared.js";
import { spillBitmapBytes, SpillFile } from "../../../src/cow/spill.js";
import { MemoryDevice } from "../../support/nbd-peer.js";

const DISK_BYTES = 1024 * 1024;

let folder: string;
let spillFd: number;
let image: MemoryDevice;
let shared: SharedState;

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "cowcatcher-detach-"));
  spillFd = openSync(join(folder, "spill"), "w+");
  image = new MemoryDevice(DISK_BYTES);
  image.data.fill(7);
  image.mode = "later";
  image.autoRelease = false;
});
afterEach(() => {
  closeSync(spillFd);
  rmSync(folder, { recursive: true });
});

function intercept(bufferBytes: number): Interceptor {
  const geometry = geometryOf(DISK_BYTES);
  shared = createSharedState(geometry, new SharedArrayBuffer(bufferBytes), bufferBytes);
  const bitmaps = new SharedArrayBuffer(spillBitmapBytes(geometry));
  return new Interceptor({
    shared,
    image,
    openSpill: () => new SpillFile({ path: join(folder, "spill"), fd: spillFd, bitmaps }, geometry),
    spillLimitBytes: DISK_BYTES,
    policy: { onBufferFull: "spill", onCbwError: "break-snapshot", guestTimeoutMs: 1e9 },
    onBroken: (error) => {
      throw error;
    },
  });
}

async function isSettled(promise: Promise<unknown>): Promise<boolean> {
  const turn = new Promise<boolean>((settle) => setImmediate(() => settle(false)));
  return Promise.race([promise.then(() => true), turn]);
}

it("keeps the buffer until the read into it is over, and lets the guest's write go on", async () => {
  const interceptor = intercept(SLOT_BYTES);
  const write = Promise.resolve(interceptor.beforeWrite(0, BLOCK_BYTES));
  interceptor.detach();
  const idle = interceptor.idle();
  expect(await isSettled(idle)).toBe(false);
  image.releaseAll();
  await idle;
  await write;
  expect(shared.chunkWords[0] & OWNER_MASK).toBe(0);
  expect(interceptor.counters.captureCount).toBe(0);
});

it("writes nothing to the spill file any more", async () => {
  const interceptor = intercept(SLOT_BYTES);
  const first = Promise.resolve(interceptor.beforeWrite(0, SLOT_BYTES));
  image.releaseAll();
  await first;
  const spilling = Promise.resolve(interceptor.beforeWrite(4 * SLOT_BYTES, BLOCK_BYTES));
  interceptor.detach();
  image.releaseAll();
  await spilling;
  expect(readFileSync(join(folder, "spill"))).toHaveLength(0);
});

it("goes on as ever without an end of the job", async () => {
  const interceptor = intercept(SLOT_BYTES);
  const first = Promise.resolve(interceptor.beforeWrite(0, SLOT_BYTES));
  image.releaseAll();
  await first;
  const spilling = Promise.resolve(interceptor.beforeWrite(4 * SLOT_BYTES, BLOCK_BYTES));
  image.releaseAll();
  await spilling;
  expect(interceptor.counters.captureCount).toBe(2);
  expect(readFileSync(join(folder, "spill")).subarray(4 * SLOT_BYTES, 4 * SLOT_BYTES + 4)).toEqual(
    Buffer.from([7, 7, 7, 7]),
  );
});
