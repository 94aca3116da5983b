import { describe, expect, it } from "vitest";
import { DiskNode } from "../../../src/cow/disk-node.js";
import type { Interceptor } from "../../../src/cow/interceptor.js";
import type { Completion, Image } from "../../../src/block/device.js";
import { turns } from "../../support/cow-engine.js";

/** An image whose writes end when the test says so, while `slow`. */
function makeNode(name: string) {
  const image = {
    slow: false,
    written: [] as number[],
    pending: [] as { end: () => void; fail: () => void }[],
  };
  const write = (_buffer: Uint8Array, _at: number, _length: number, offset: number): Completion => {
    if (!image.slow) {
      image.written.push(offset);
      return undefined;
    }
    return new Promise((resolve, reject) => {
      const end = () => {
        image.written.push(offset);
        resolve();
      };
      image.pending.push({ end, fail: () => reject(new Error("write failed")) });
    });
  };
  const device = { name, sizeBytes: 100, readOnly: false, clusterSizeBytes: 0, write };
  return { image, node: new DiskNode(name, device as unknown as Image) };
}

/** Of a start that nothing is to hold up for long. */
const LIMIT_MS = 10_000;
const DATA = new Uint8Array(1);
const writeTo = (node: DiskNode, offset: number): Completion => node.write(DATA, 0, 1, offset);

describe("quiesceAll", () => {
  it("runs its step when no write is in flight, and holds back those that come meanwhile", async () => {
    const { image, node } = makeNode("a");
    image.slow = true;
    const before = writeTo(node, 1);
    let atT0: number[] | null = null;
    const quiescing = DiskNode.quiesceAll(
      [node],
      () => {
        atT0 = [...image.written];
      },
      LIMIT_MS,
    );
    await turns();
    const meanwhile = writeTo(node, 2);
    expect(image.pending.length).toBe(1);
    expect(atT0).toBeNull();
    image.slow = false;
    image.pending[0]?.end();
    await Promise.all([before, quiescing, meanwhile]);
    expect(atT0).toEqual([1]);
    expect(image.written).toEqual([1, 2]);
  });

  it("counts a write that fails as ended, and its error is the guest's alone", async () => {
    const { image, node } = makeNode("a");
    image.slow = true;
    const failing = Promise.resolve(writeTo(node, 1)).catch((error: Error) => error.message);
    const quiescing = DiskNode.quiesceAll([node], () => "done", LIMIT_MS);
    await turns();
    image.pending[0]?.fail();
    expect(await quiescing).toBe("done");
    expect(await failing).toBe("write failed");
  });

  it("opens both gates again when the step throws, and throws it on", async () => {
    const [a, b] = [makeNode("a"), makeNode("b")];
    const error = new Error("step");
    await expect(
      DiskNode.quiesceAll(
        [a.node, b.node],
        () => {
          throw error;
        },
        LIMIT_MS,
      ),
    ).rejects.toBe(error);
    expect(writeTo(a.node, 1)).toBeUndefined();
    expect(writeTo(b.node, 1)).toBeUndefined();
  });

  it("of groups that share disks runs one after the other, whatever order they name them in", async () => {
    const [a, b] = [makeNode("a"), makeNode("b")];
    a.image.slow = true;
    const write = writeTo(a.node, 1);
    const order: string[] = [];
    const quiescing = [
      DiskNode.quiesceAll([a.node, b.node], () => order.push("first"), LIMIT_MS),
      DiskNode.quiesceAll([b.node, a.node], () => order.push("second"), LIMIT_MS),
      DiskNode.quiesceAll([b.node], () => order.push("third"), LIMIT_MS),
    ];
    await turns();
    a.image.pending[0]?.end();
    await Promise.all([write, ...quiescing]);
    expect(order.sort()).toEqual(["first", "second", "third"]);
    expect(order.indexOf("first")).toBeLessThan(order.indexOf("second"));
  });

  it("is not held up for ever by a guest that never stops writing", async () => {
    const { image, node } = makeNode("a");
    image.slow = true;
    let stop = false;
    const writers = Array.from({ length: 4 }, async (_, i) => {
      while (!stop) await writeTo(node, i);
    });
    const quiescing = DiskNode.quiesceAll(
      [node],
      () => {
        stop = true;
      },
      LIMIT_MS,
    );
    for (let i = 0; i < 20; i++) {
      for (const { end } of image.pending.splice(0)) end();
      await turns(1);
    }
    await quiescing;
    image.slow = false;
    for (const { end } of image.pending.splice(0)) end();
    await Promise.all(writers);
  });
});

describe("a start that is given up", () => {
  const reason = new Error("cancelled");

  it("while a write is in flight: the guests go on at once, and the step does not run", async () => {
    const [a, b] = [makeNode("a"), makeNode("b")];
    b.image.slow = true;
    const hung = writeTo(b.node, 1);
    const abort = new AbortController();
    let hasRun = false;
    const quiescing = DiskNode.quiesceAll([a.node, b.node], () => (hasRun = true), LIMIT_MS, abort.signal);
    await turns();
    const meanwhile = writeTo(a.node, 2);
    expect(meanwhile).toBeInstanceOf(Promise);
    abort.abort(reason);
    await expect(quiescing).rejects.toBe(reason);
    await meanwhile;
    b.image.slow = false;
    expect(writeTo(b.node, 3)).toBeUndefined();
    b.image.pending[0]?.end();
    await hung;
    expect(hasRun).toBe(false);
    expect(await DiskNode.quiesceAll([a.node, b.node], () => "next", LIMIT_MS)).toBe("next");
  });

  it("while it waits for another start: that one goes on", async () => {
    const { image, node } = makeNode("a");
    image.slow = true;
    const write = writeTo(node, 1);
    const first = DiskNode.quiesceAll([node], () => "first", LIMIT_MS);
    const abort = new AbortController();
    const second = DiskNode.quiesceAll([node], () => "second", LIMIT_MS, abort.signal);
    await turns();
    abort.abort(reason);
    await expect(second).rejects.toBe(reason);
    const meanwhile = writeTo(node, 2);
    expect(image.pending.length).toBe(1);
    image.slow = false;
    image.pending[0]?.end();
    expect(await first).toBe("first");
    await Promise.all([write, meanwhile]);
  });

  it("before it begins closes no gate", async () => {
    const { node } = makeNode("a");
    const quiescing = DiskNode.quiesceAll([node], () => "run", LIMIT_MS, AbortSignal.abort(reason));
    expect(writeTo(node, 1)).toBeUndefined();
    await expect(quiescing).rejects.toBe(reason);
  });

  it("in the turns in which the last write ends runs its step, or throws; nothing in between", async () => {
    const ran: boolean[] = [];
    for (let steps = 0; steps < 20; steps++) {
      const { image, node } = makeNode("a");
      image.slow = true;
      const write = writeTo(node, 1);
      const abort = new AbortController();
      let hasRun = false;
      const quiescing = DiskNode.quiesceAll([node], () => (hasRun = true), LIMIT_MS, abort.signal);
      await turns();
      image.pending[0]?.end();
      for (let i = 0; i < steps; i++) await Promise.resolve();
      const ranBefore = hasRun;
      abort.abort(reason);
      const result = await quiescing.catch((error: unknown) => error);
      expect(result).toBe(ranBefore ? true : reason);
      expect(hasRun).toBe(ranBefore);
      image.slow = false;
      expect(writeTo(node, 2)).toBeUndefined();
      await write;
      ran.push(hasRun);
    }
    expect(ran[0]).toBe(false);
    expect(ran.at(-1)).toBe(true);
  });
});

describe("a start that cannot have its instant", () => {
  it("gives up when one disk's storage does not answer in time, and no guest waits any longer", async () => {
    const [a, b] = [makeNode("a"), makeNode("b")];
    b.image.slow = true;
    const hung = writeTo(b.node, 1);
    let hasRun = false;
    const quiescing = DiskNode.quiesceAll([b.node, a.node], () => (hasRun = true), 30);
    await turns();
    const meanwhile = writeTo(a.node, 2);
    expect(meanwhile).toBeInstanceOf(Promise);
    await expect(quiescing).rejects.toMatchObject({
      code: "GUEST_TIMEOUT",
      object: "b",
      message: expect.stringContaining("30 ms") as unknown,
    });
    await meanwhile;
    expect(a.image.written).toEqual([2]);
    expect(writeTo(a.node, 3)).toBeUndefined();
    expect(hasRun).toBe(false);
    // The storage is there again, and so is the next backup.
    b.image.slow = false;
    b.image.pending[0]?.end();
    await hung;
    expect(await DiskNode.quiesceAll([a.node, b.node], () => "T0", LIMIT_MS)).toBe("T0");
  });

  it("waits no longer for another group's start than for a write", async () => {
    const [a, b] = [makeNode("a"), makeNode("b")];
    b.image.slow = true;
    const hung = writeTo(b.node, 1);
    const first = DiskNode.quiesceAll([b.node], () => "first", LIMIT_MS);
    await turns();
    await expect(DiskNode.quiesceAll([a.node, b.node], () => "second", 30)).rejects.toMatchObject({
      code: "GUEST_TIMEOUT",
      object: "b",
    });
    expect(writeTo(a.node, 2)).toBeUndefined();
    b.image.pending[0]?.end();
    expect(await first).toBe("first");
    await hung;
    expect(await DiskNode.quiesceAll([a.node, b.node], () => "third", LIMIT_MS)).toBe("third");
  });
});

describe("a write", () => {
  it("that waited for an interceptor meets one that came meanwhile", async () => {
    const { image, node } = makeNode("a");
    let letGo: () => void = () => {};
    const asked: string[] = [];
    const waiting = new Promise<void>((resolve) => {
      letGo = resolve;
    });
    let first = true;
    const slow = {
      beforeWrite: () => {
        asked.push("slow");
        if (!first) return undefined;
        first = false;
        return waiting;
      },
    } as unknown as Interceptor;
    const late = { beforeWrite: () => void asked.push("late") } as unknown as Interceptor;
    await DiskNode.quiesceAll([node], () => node.addInterceptor(slow), LIMIT_MS);
    const write = writeTo(node, 1);
    await DiskNode.quiesceAll([node], () => node.addInterceptor(late), LIMIT_MS);
    letGo();
    await write;
    expect(asked).toEqual(["slow", "slow", "late"]);
    expect(image.written).toEqual([1]);
    node.removeInterceptor(slow);
    node.removeInterceptor(late);
    expect(writeTo(node, 2)).toBeUndefined();
    expect(asked.length).toBe(3);
  });

  it("that an interceptor fails is not made", async () => {
    const { image, node } = makeNode("a");
    const failing = {
      beforeWrite: () => {
        throw new Error("no capture");
      },
    } as unknown as Interceptor;
    await DiskNode.quiesceAll([node], () => node.addInterceptor(failing), LIMIT_MS);
    await expect(writeTo(node, 1)).rejects.toThrow("no capture");
    expect(image.written).toEqual([]);
  });
});

describe("a trim or write of zeroes longer than a piece", () => {
  const GiB = 2 ** 30;

  /** An image that takes notes, and lets each piece go when the test says so. */
  function makeHugeNode() {
    const pieces: [number, number][] = [];
    const releases: (() => void)[] = [];
    const step = (offset: number, length: number): Promise<void> => {
      pieces.push([offset, length]);
      return new Promise((resolve) => releases.push(resolve));
    };
    const device = { name: "huge", sizeBytes: 16 * GiB, writeZeroes: step, discard: step };
    return { pieces, releases, node: new DiskNode("huge", device as unknown as Image) };
  }

  it.each(["writeZeroes", "discard"] as const)(
    "%s: covers the range, and T0 waits for all of it",
    async (kind) => {
      const { pieces, releases, node } = makeHugeNode();
      const length = 2 * GiB + 4096;
      const clearing =
        kind === "discard" ? node.discard(512, length) : node.writeZeroes(512, length, { mayUnmap: true });
      await turns();
      let piecesAtT0: number | undefined;
      const quiescing = DiskNode.quiesceAll(
        [node],
        () => {
          piecesAtT0 = pieces.length;
        },
        LIMIT_MS,
      );
      for (let piece = 0; piece < 3; piece++) {
        await turns();
        expect(piecesAtT0).toBeUndefined();
        releases[piece]?.();
      }
      await Promise.all([clearing, quiescing]);
      expect(piecesAtT0).toBe(3);
      expect(pieces).toEqual([
        [512, GiB],
        [512 + GiB, GiB],
        [512 + 2 * GiB, 4096],
      ]);
    },
  );

  it("holds up nobody's short writes while T0 waits for it", async () => {
    const { releases, node } = makeHugeNode();
    const other = makeNode("other");
    const clearing = node.discard(0, 2 * GiB);
    await turns();
    let isT0 = false;
    const quiescing = DiskNode.quiesceAll([other.node, node], () => (isT0 = true), LIMIT_MS);
    await turns();
    expect(writeTo(other.node, 1)).toBeUndefined();
    const short = node.discard(0, 4096);
    expect(releases.length).toBe(2);
    releases[1]?.();
    await short;
    releases[0]?.();
    await turns();
    expect(isT0).toBe(false);
    releases[2]?.();
    await Promise.all([clearing, quiescing]);
    expect(isT0).toBe(true);
  });

  it("waits for T0 if it comes while one waits for another, so that these cannot put T0 off for ever", async () => {
    const { pieces, releases, node } = makeHugeNode();
    const first = node.discard(0, 2 * GiB);
    await turns();
    let piecesAtT0: number | undefined;
    const quiescing = DiskNode.quiesceAll([node], () => (piecesAtT0 = pieces.length), LIMIT_MS);
    await turns();
    const second = node.discard(4 * GiB, 2 * GiB);
    for (let piece = 0; piece < 4; piece++) {
      await turns();
      releases[piece]?.();
    }
    await Promise.all([first, quiescing, second]);
    expect(piecesAtT0).toBe(2);
    expect(pieces.length).toBe(4);
  });

  it("ends a start that waits for it beyond the limit", async () => {
    const { pieces, releases, node } = makeHugeNode();
    const first = node.discard(0, 2 * GiB);
    await turns();
    const quiescing = DiskNode.quiesceAll([node], () => "T0", 30);
    const second = node.discard(4 * GiB, 2 * GiB);
    await expect(quiescing).rejects.toMatchObject({
      code: "GUEST_TIMEOUT",
      object: "huge",
      problem: expect.stringMatching(/trim.* 30 ms/) as unknown,
    });
    await turns();
    expect(pieces).toEqual([
      [0, GiB],
      [4 * GiB, GiB],
    ]);
    for (let piece = 0; piece < 4; piece++) {
      releases[piece]?.();
      await turns();
    }
    await Promise.all([first, second]);
  });

  it("passes the interceptors piece by piece, and begins only when the gate is open", async () => {
    const { pieces, releases, node } = makeHugeNode();
    const asked: number[] = [];
    node.addInterceptor({
      beforeWrite(offset: number): Completion {
        asked.push(offset);
        return undefined;
      },
    } as unknown as Interceptor);
    let clearing: Completion;
    await DiskNode.quiesceAll(
      [node],
      () => {
        clearing = node.discard(0, 2 * GiB);
        expect(pieces).toEqual([]);
      },
      LIMIT_MS,
    );
    await turns();
    releases[0]?.();
    await turns();
    releases[1]?.();
    await clearing;
    expect(asked).toEqual([0, GiB]);
  });
});
