// COWCATCHER_FAULTS: what it understands, what it refuses, and that each fault strikes when it should.
import { describe, expect, it } from "vitest";
import { parseFaults, withFaults } from "../../../src/backup/copy/faults.js";
import { CTL_RUN, RUN_ABORTING, RUN_RUNNING } from "../../../src/cow/shared.js";
import { CowcatcherError } from "../../../src/errors.js";
import type { SourceReader } from "../../../src/block/device.js";
import type { TargetWriter } from "../../../src/cow/target-writer.js";

const MiB = 1024 * 1024;

describe("the syntax", () => {
  it("takes stages, actions and options", () => {
    const text =
      " target-write:error=ENOSPC,from=1M,to=2M,after=1,count=2; source-read:delay=20ms ;worker:exit,worker=3;";
    expect(parseFaults(text)).toEqual([
      {
        stage: "target-write",
        action: "error",
        errno: "ENOSPC",
        delayMs: 0,
        cutBytes: 0,
        cutFile: undefined,
        fromBytes: MiB,
        toBytes: 2 * MiB,
        after: 1,
        count: 2,
        workerIndex: undefined,
      },
      expect.objectContaining({ stage: "source-read", action: "delay", delayMs: 20, count: Infinity }),
      expect.objectContaining({ stage: "worker", action: "exit", workerIndex: 3 }),
    ]);
    expect(parseFaults("source-read:cut=1M,file=/a/b.raw")[0]).toMatchObject({
      action: "cut",
      cutBytes: MiB,
      cutFile: "/a/b.raw",
    });
    expect(parseFaults("")).toEqual([]);
  });

  it.each([
    [
      "target:error",
      "COWCATCHER_FAULTS: 'target' is no stage (give target-write, target-read, source-read, worker)",
    ],
    [
      "error=EIO",
      "COWCATCHER_FAULTS: 'error=EIO' is no stage (give target-write, target-read, source-read, worker)",
    ],
    [
      "worker:explode",
      "COWCATCHER_FAULTS: 'explode' is no action (give error, delay, hang, corrupt, cut, exit, throw)",
    ],
    ["worker", "COWCATCHER_FAULTS: '' is no action (give error, delay, hang, corrupt, cut, exit, throw)"],
    ["worker:error", "COWCATCHER_FAULTS: 'worker:error' makes no sense (give exit, throw or delay)"],
    [
      "source-read:corrupt",
      "COWCATCHER_FAULTS: 'source-read:corrupt' makes no sense (give target-write:corrupt)",
    ],
    ["target-read:cut=1M", "COWCATCHER_FAULTS: 'target-read:cut' makes no sense (give source-read:cut)"],
    ["source-read:cut", "COWCATCHER_FAULTS: 'cut' needs a size (give cut=1M)"],
    ["target-write:corrupt=1", "COWCATCHER_FAULTS: 'corrupt=1' takes no value"],
    ["target-write:error=EWHAT", "COWCATCHER_FAULTS: 'EWHAT' is no errno (give a name such as EIO)"],
    ["target-write:delay", "COWCATCHER_FAULTS: 'delay' needs a duration (give delay=20ms)"],
    [
      "target-write:delay=x",
      "COWCATCHER_FAULTS: 'x' is not a duration (give seconds, or a number with ms, s or m, such as 500ms)",
    ],
    ["worker:exit=1", "COWCATCHER_FAULTS: 'exit=1' takes no value"],
    [
      "worker:exit,from=x",
      "COWCATCHER_FAULTS: 'x' is not a size (give bytes, or a number with K, M, G, T, P or E, such as 64K)",
    ],
    ["worker:exit,after=-1", "COWCATCHER_FAULTS: 'after=-1' needs a number"],
    ["worker:exit,count", "COWCATCHER_FAULTS: 'count' needs a number"],
    [
      "worker:exit,often=1",
      "COWCATCHER_FAULTS: 'often=1' is no option (give from, to, after, count, worker or file)",
    ],
  ])("refuses %s", (text, message) => {
    expect(() => parseFaults(text)).toThrow(expect.objectContaining({ code: "USAGE", message }) as Error);
  });
});

describe("the stage", () => {
  const calls: string[] = [];
  const innerReader: SourceReader = {
    sizeBytes: 8 * MiB,
    read: (_buffer, _bufferOffset, length, offset) => void calls.push(`read ${offset}+${length}`),
    extent: (_offset, length) => ({ lengthBytes: length, zero: false }),
    close: () => undefined,
  };
  const innerWriter: TargetWriter = {
    write: (_buffer, _bufferOffset, length, offset) => void calls.push(`write ${offset}+${length}`),
    writeZeroes: (offset, length) => void calls.push(`zero ${offset}+${length}`),
    close: () => undefined,
  };
  const buffer = new Uint8Array(MiB);
  const control = new Int32Array(new SharedArrayBuffer(64));

  function faulty(text: string | undefined, workerIndex = 0): { reader: SourceReader; writer: TargetWriter } {
    calls.length = 0;
    Atomics.store(control, CTL_RUN, RUN_RUNNING);
    const place = { control, workerIndex, chunkBytes: MiB, sourceName: "source", targetName: "target" };
    return withFaults(text, innerReader, innerWriter, place);
  }

  it("is not there without the variable", () => {
    const { reader, writer } = faulty(undefined);
    expect(reader).toBe(innerReader);
    expect(writer).toBe(innerWriter);
  });

  it("fails what touches the range, after some and for a number of times", () => {
    const { writer } = faulty("target-write:error=EIO,from=1M,to=2M,after=1,count=2");
    const write = (offset: number): unknown => writer.write(buffer, 0, 4096, offset);
    write(MiB - 4096);
    write(2 * MiB);
    write(MiB);
    expect(() => write(MiB + 4096)).toThrow("target: cannot write: input/output error at offset 1052672");
    expect(() => writer.writeZeroes(2 * MiB - 1, 4096)).toThrow(CowcatcherError);
    write(MiB);
    expect(calls).toEqual([
      "write 1044480+4096",
      "write 2097152+4096",
      "write 1048576+4096",
      "write 1048576+4096",
    ]);
  });

  it("fails reads with the source's name", () => {
    const { reader } = faulty("source-read:error=EIO,count=1");
    expect(() => reader.extent(512, 512)).toThrow("source: cannot read: input/output error at offset 512");
    expect(reader.read(buffer, 0, 512, 512)).toBeUndefined();
  });

  it("strikes only the worker that is named, once a chunk", () => {
    const other = faulty("worker:throw,worker=1,after=1").reader;
    for (let chunk = 0; chunk < 4; chunk++) other.extent(chunk * MiB, MiB);
    const { reader } = faulty("worker:throw,worker=1,after=1", 1);
    reader.extent(0, 8 * MiB);
    reader.extent(0, MiB);
    reader.extent(512, 512);
    expect(() => reader.extent(MiB, MiB)).toThrow(TypeError);
  });

  it("delays no longer than the job lasts", () => {
    const { writer } = faulty("target-write:delay=40ms");
    const startMs = performance.now();
    void writer.writeZeroes(0, 512);
    expect(performance.now() - startMs).toBeGreaterThan(35);
    Atomics.store(control, CTL_RUN, RUN_ABORTING);
    const abortedMs = performance.now();
    void faultyWhileAborting("target-write:delay=1h").writeZeroes(0, 512);
    expect(performance.now() - abortedMs).toBeLessThan(60_000);
  });

  function faultyWhileAborting(text: string): TargetWriter {
    const { writer } = faulty(text);
    Atomics.store(control, CTL_RUN, RUN_ABORTING);
    return writer;
  }
});
