// serve --metrics: counters that only grow through the ends of jobs, and an HTTP server that is asked one thing.
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { JOB_DEFAULTS } from "../../../src/backup/options.js";
import { Metrics, type MetricsServer, serveMetrics } from "../../../src/control/metrics.js";
import { countWait, noWaits } from "../../../src/cow/wait-histogram.js";
import { CowcatcherError } from "../../../src/errors.js";
import { FakeJobHost } from "../../support/fake-job-host.js";

let host: FakeJobHost;
beforeEach(() => {
  host = new FakeJobHost();
});

async function start(id: string, disk = "disk") {
  const options = { ...JOB_DEFAULTS, target: "/t", targetFormat: "raw" as const };
  await host.startBackups([{ id, disk, options }]);
  const job = host.job(id);
  job.counters = {
    ...job.counters,
    bytesWritten: 100,
    guestWaitCount: 2,
    guestWaitMsTotal: 30,
    guestWaitMsMax: 20,
    guestWaitCounts: waitsOf(10, 20),
  };
  return job;
}

function waitsOf(...ms: number[]): number[] {
  const counts = noWaits();
  for (const wait of ms) countWait(counts, wait);
  return counts;
}

/** The value of a sample; undefined where it is not there. */
function valueOf(text: string, sample: string): number | undefined {
  const line = text.split("\n").find((one) => one.startsWith(`${sample} `));
  return line === undefined ? undefined : Number(line.slice(sample.length + 1));
}

describe("counters", () => {
  it("count on when a job ends and is forgotten, by disk and result, each job once", async () => {
    const metrics = new Metrics(host, "1");
    const waits = (): number | undefined =>
      valueOf(metrics.text(), 'cowcatcher_guest_wait_seconds_sum{disk="disk"}');
    expect(waits()).toBe(0);
    const first = await start("a");
    expect(waits()).toBe(0.03);
    first.succeed();
    first.to("null");
    expect(waits()).toBe(0.03);
    host.jobList = [];
    expect(waits()).toBe(0.03);
    (await start("b")).cancel();
    (await start("c")).fail(new CowcatcherError({ code: "IO", object: "", problem: "" }));
    await start("d");
    const text = metrics.text();
    expect(valueOf(text, 'cowcatcher_guest_wait_seconds_count{disk="disk"}')).toBe(8);
    const bucket = (le: string) =>
      valueOf(text, `cowcatcher_guest_wait_seconds_bucket{disk="disk",le="${le}"}`);
    expect(["0.005", "0.01", "0.025", "60", "+Inf"].map(bucket)).toEqual([0, 4, 8, 8, 8]);
    expect(valueOf(text, 'cowcatcher_written_bytes_total{disk="disk"}')).toBe(400);
    expect(valueOf(text, 'cowcatcher_written_bytes_total{disk="data"}')).toBe(0);
    for (const result of ["done", "failed", "cancelled"]) {
      expect(valueOf(text, `cowcatcher_jobs_ended_total{disk="disk",result="${result}"}`)).toBe(1);
    }
    expect(valueOf(text, 'cowcatcher_jobs{disk="disk"}')).toBe(1);
    expect(valueOf(text, 'cowcatcher_guest_wait_max_seconds{disk="disk"}')).toBe(0.02);
    metrics.close();
    expect(host.listeners.size).toBe(0);
  });

  it("are in the format: each metric once, its samples behind its help and type", async () => {
    const [disk] = host.diskList;
    if (disk !== undefined) host.diskList[0] = { ...disk, name: 'a"\\\n' };
    await start("a", "data");
    const text = new Metrics(host, "1").text();
    expect(text.endsWith("\n")).toBe(true);
    const seen = new Set<string>();
    let metric = "";
    for (const line of text.trimEnd().split("\n")) {
      const [, kind, name = ""] = /^# (HELP|TYPE) (\S+)/.exec(line) ?? [];
      if (kind === "HELP") {
        expect(seen.has(name)).toBe(false);
        seen.add((metric = name));
      } else if (kind === "TYPE") {
        const type = name === "cowcatcher_guest_wait_seconds" ? "histogram" : "gauge";
        expect(line.endsWith(name.endsWith("_total") ? " counter" : ` ${type}`)).toBe(true);
      } else {
        expect(line).toMatch(
          new RegExp(
            `^${metric}(?:_bucket|_sum|_count)?\\{(?:[a-z]+="(?:[^"\\\\\\n]|\\\\.)*",?)+\\} [\\d.e+-]+$`,
          ),
        );
      }
    }
    expect(text).toContain('cowcatcher_disk_size_bytes{disk="a\\"\\\\\\n"} 4096\n');
  });
});

describe("the server", () => {
  let server: MetricsServer;
  afterEach(() => server.close());

  it("answers for /metrics, and refuses all else", async () => {
    server = await serveMetrics(host, "1.2", { host: "127.0.0.1", port: 0 });
    const address = `http://127.0.0.1:${server.port}`;
    const answer = await fetch(`${address}/metrics`);
    expect(answer.headers.get("content-type")).toBe("text/plain; version=0.0.4; charset=utf-8");
    expect(await answer.text()).toContain('cowcatcher_build_info{version="1.2"} 1\n');
    expect((await fetch(`${address}/`)).status).toBe(404);
    expect((await fetch(`${address}/metrics`, { method: "POST" })).status).toBe(405);
    const taken = serveMetrics(host, "1", { host: "127.0.0.1", port: server.port });
    await expect(taken).rejects.toMatchObject({ errno: "EADDRINUSE" });
  });
});
