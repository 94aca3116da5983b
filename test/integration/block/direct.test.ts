// `serve --direct` with real clients, by io_uring and by libuv's pool: fio that verifies, qemu-io, and a guest with a model.
import { copyFileSync, readFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, expect, it } from "vitest";
import { describeDirectIo } from "../../../src/block/file/direct-io.js";
import { sampled } from "../../support/campaign.js";
import { expectClean, expectSame, makeDisk, noise } from "../../support/disks.js";
import { mustRun, scratchFolder, Server, stopAll } from "../../support/server.js";

const MiB = 1024 * 1024;
afterAll(stopAll);

it.concurrent.each(
  sampled(
    [
      { extension: "qcow2", wanted: "io_uring" },
      { extension: "raw", wanted: "io_uring" },
      { extension: "raw", wanted: "threads" },
    ],
    2,
  ),
)(
  "a $extension disk by $wanted: guests lose nothing, and a backup shows T0",
  async ({ extension, wanted }) => {
    // On a disk: in memory O_DIRECT means nothing.
    const folder = scratchFolder(tmpdir());
    const at = (name: string): string => join(folder, name);
    // Its end lies within a block.
    const disk = await makeDisk(at(`disk.${extension}`), noise(12 * MiB + 1024));
    const frozen = at(`frozen.${extension}`);
    copyFileSync(disk, frozen);
    const format = ["-f", extension];
    const server = await Server.start(folder, [disk], {
      args: [...format, "--name", "disk", "--direct", "--log-level", "debug", "--log-file", at("log")],
      env: wanted === "threads" ? { COWCATCHER_NO_IO_URING: "1" } : {},
    });
    const target = at("target.raw");
    const backup = server.backup(target, "--direct", "--rate-limit", "1M", "--cow-buffer-size", "64M");
    await backup.started();
    await mustRun(
      "fio",
      ...["--name=guest", "--ioengine=nbd", `--uri=${server.uri()}`, "--rw=randwrite", "--size=12M"],
      ...["--bsrange=512-64k", "--bs_unaligned=1", "--iodepth=32", "--verify=crc32c", "--do_verify=1"],
      ...["--verify_fatal=1", "--randrepeat=1", "--output=/dev/null"],
    );
    const summary = await backup.release(server);
    expect(summary.captures).toBeGreaterThan(50);
    const odd = 12 * MiB - 3;
    await mustRun(
      "qemu-io",
      ...["-f", "raw", server.uri(), "-c", `write -P 0x5a ${odd} 1027`, "-c", "flush"],
      ...["-c", `read -P 0x5a ${odd} 1027`, "-c", "write -z 4095 2", "-c", "read -P 0 4095 2"],
    );
    const guest = await server.guest(5);
    guest.run();
    await guest.progress(60);
    await guest.pause();
    expect(await guest.verify()).toBe("same");
    await guest.dump(at("model.raw"));
    await guest.quit();
    expect((await server.stop()).code).toBe(0);
    await expectSame(frozen, target);
    await expectSame(at("model.raw"), disk);
    await expectClean(disk);
    // Where this system has no io_uring, both are by the pool.
    const { method } = await describeDirectIo();
    expect(readFileSync(at("log"), "utf8")).toContain(
      `"method":"${wanted === "threads" ? "threads" : method}"`,
    );
  },
);
