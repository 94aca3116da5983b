// Which checkpoint belongs to which backup, what is built on it, and what a dead run has left: against a virsh whose answers are
// libvirt 9.0's.
import { mkdtempSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import {
  asMissingBasis,
  checkpointName,
  deadCheckpoints,
  describeOrigin,
  findBasis,
  isComplete,
  readOrigin,
} from "../../../src/libvirt/checkpoints.js";
import { refuseBusy, runOfJob } from "../../../src/libvirt/job.js";
import { refuseMethod } from "../../../src/libvirt/risks.js";
import { Virsh, VirshError } from "../../../src/libvirt/virsh.js";
import { escapeXml } from "../../../src/libvirt/xml.js";
import { bitmapOfFile, type BitmapWish, chainOfFiles } from "../../../src/qemu/bitmaps.js";
import { runName } from "../../../src/qemu/names.js";

const DEAD = "cowcatcher-1.0fffffff1";

/** Answers by command, or by command and its last option. */
class ScriptedVirsh extends Virsh {
  constructor(private readonly answers: Record<string, string>) {
    super(undefined, "vm1");
  }
  override run(command: string, ...options: string[]): Promise<string> {
    const answer = this.answers[`${command} ${options[0] ?? ""}`.trim()] ?? this.answers[command];
    if (answer !== undefined) return Promise.resolve(answer);
    return Promise.reject(
      new VirshError({ code: "IO", object: "vm1", problem: command }, "no domain backup job present"),
    );
  }
  override hypervisor(): Promise<string> {
    return Promise.resolve(this.answers["version"] ?? "");
  }
}

let folder = "";
let path = "";
let other = "";

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "cowcatcher-checkpoints-"));
  path = join(folder, "0.qcow2");
  other = join(folder, "b.qcow2");
  writeFileSync(path, "");
  writeFileSync(other, "");
});
afterEach(() => rmSync(folder, { recursive: true }));

const nameOf = (...files: [string, string][]): string =>
  checkpointName(files.map(([disk, file]) => [disk, bitmapOfFile(file)]));

function described(name: string, description: string, size = " size='0'"): string {
  return `<domaincheckpoint><name>${name}</name><description>${escapeXml(description)}</description><disks>
    <disk name='vda' checkpoint='bitmap' bitmap='${name}'${size}/><disk name='vdb' checkpoint='no'/></disks></domaincheckpoint>`;
}

describe("checkpointName", () => {
  it("tells files, disks and what belongs together apart, whatever their order", () => {
    const both = nameOf(["vda", path], ["vdb", other]);
    expect(both).toMatch(/^cowcatcher-checkpoint-[0-9a-f]{16}$/);
    expect(nameOf(["vdb", other], ["vda", path])).toBe(both);
    const all = [both, nameOf(["vda", path]), nameOf(["vdb", path]), nameOf(["vda", other], ["vdb", path])];
    expect(new Set(all).size).toBe(4);
  });

  it("is another one when a file was written anew under the same name", () => {
    const before = nameOf(["vda", path]);
    renameSync(other, path);
    expect(nameOf(["vda", path])).not.toBe(before);
  });
});

describe("findBasis", () => {
  const disks = [{ name: "vda" }];
  const chain = (wish: BitmapWish) => [chainOfFiles(wish, "/b/new.qcow2")];
  const wish = (orFull: boolean) => chain({ base: path, orFull });

  it("begins a chain without a base", async () => {
    const virsh = new ScriptedVirsh({ "checkpoint-list": "\n" });
    expect(await findBasis(virsh, disks, chain({ base: undefined, orFull: false }))).toEqual({
      old: undefined,
      ended: [],
      info: { level: "full", bitmapAction: "new" },
    });
  });

  it("builds on the base's checkpoint", async () => {
    const name = nameOf(["vda", path]);
    const virsh = new ScriptedVirsh({
      "checkpoint-list": `theirs\n${name}\n`,
      [`checkpoint-dumpxml --checkpointname=${name}`]: described(name, ""),
    });
    const basis = await findBasis(virsh, disks, wish(false));
    expect(basis).toMatchObject({ old: name, info: { level: "incremental", bitmapAction: "used" } });
    // It goes when the backup is good, unless that is looked over first.
    expect(basis.ended).toEqual([name]);
    const kept = wish(false).map((one) => ({ ...one, keepsBase: true }));
    expect(await findBasis(virsh, disks, kept)).toMatchObject({ old: name, ended: [] });
  });

  it.each([
    ["missing", "libvirt has no checkpoint of what has changed since"],
    ["invalid", "recorded of vda is gone, or broken"],
  ])("ends, or is full where that is allowed, when it is %s", async (action, reason) => {
    const name = nameOf(["vda", path]);
    const virsh = new ScriptedVirsh({
      "checkpoint-list": action === "invalid" ? `${name}\n` : "\n",
      [`checkpoint-dumpxml --checkpointname=${name}`]: described(name, "", ""),
    });
    await expect(findBasis(virsh, disks, wish(false))).rejects.toMatchObject({ code: "NO_BASIS" });
    const full = await findBasis(virsh, disks, wish(true));
    expect(full.info).toMatchObject({ level: "full", bitmapAction: action });
    expect(full.info.reason).toContain(reason);
  });

  it("has no more than sixteen, but counts those that it ends", async () => {
    const own = nameOf(["vda", path]);
    const names = [
      own,
      ...Array.from({ length: 15 }, (_, i) => `cowcatcher-checkpoint-${String(i).padStart(16, "0")}`),
    ];
    const origin = describeOrigin({ run: DEAD, targets: [{ disk: "vda", path }] });
    const foreign = describeOrigin({ run: DEAD, targets: [{ disk: "vda", path: "/gone" }] });
    const virsh = new ScriptedVirsh({
      "checkpoint-list": names.join("\n"),
      "checkpoint-dumpxml": described("x", foreign),
      [`checkpoint-dumpxml --checkpointname=${own}`]: described(own, origin),
    });
    const begin = (replaced?: string[]) =>
      findBasis(virsh, disks, chain({ base: undefined, orFull: false, replaced }));
    await expect(begin()).rejects.toMatchObject({ code: "LIMIT" });
    expect((await begin([path])).ended).toEqual([own]);
  });
});

describe("what runs have left", () => {
  it("is read from the description, and nothing else is", () => {
    const origin = { run: DEAD, targets: [{ disk: "vda", path: "/b/ä.qcow2" }] };
    expect(readOrigin(describeOrigin(origin))).toEqual(origin);
    for (const text of ["", "backup of monday", "{}", '{"run":"cowcatcher","targets":[]}', "[1]"]) {
      expect(readOrigin(text)).toBeUndefined();
    }
  });

  it("is of dead runs alone, and complete when all of its files are there", async () => {
    const [dead, alive] = [nameOf(["vda", path]), nameOf(["vda", other])];
    const virsh = new ScriptedVirsh({
      "checkpoint-list": ["theirs", dead, alive].join("\n"),
      [`checkpoint-dumpxml --checkpointname=${dead}`]: described(
        dead,
        describeOrigin({ run: DEAD, targets: [{ disk: "vda", path }] }),
      ),
      [`checkpoint-dumpxml --checkpointname=${alive}`]: described(
        alive,
        describeOrigin({ run: runName(), targets: [{ disk: "vda", path: other }] }),
      ),
    });
    const [found, ...others] = await deadCheckpoints(virsh);
    expect([found?.name, others]).toEqual([dead, []]);
    if (found === undefined) return;
    expect(isComplete(dead, found.origin)).toBe(true);
    rmSync(path);
    expect(isComplete(dead, found.origin)).toBe(false);
  });
});

describe("the domain's job", () => {
  const served = (socket: string): string =>
    `<domainbackup mode='pull'><server transport='unix' socket='${socket}'/><disks/></domainbackup>`;

  it("is ours by the folder of its socket", async () => {
    const job = (socket: string) => runOfJob(new ScriptedVirsh({ "backup-dumpxml": served(socket) }));
    expect(await job(`/var/tmp/${DEAD}/nbd.sock`)).toEqual({
      run: DEAD,
      folder: `/var/tmp/${DEAD}`,
      socket: `/var/tmp/${DEAD}/nbd.sock`,
    });
    expect(await job("/var/tmp/virtnbdbackup.1/sock")).toBeUndefined();
    expect(await job(`/var/tmp/${DEAD}r1/nbd.sock`)).toBeUndefined();
    expect(await runOfJob(new ScriptedVirsh({}))).toBeUndefined();
  });

  it("keeps a second one from it, and says whose it is", async () => {
    const busy = (answers: Record<string, string>) => refuseBusy(new ScriptedVirsh(answers));
    await busy({ domjobinfo: "Job type:         None        \n\n" });
    const migration = "Job type:         Unbounded   \nOperation:        Outgoing migration\n";
    await expect(busy({ domjobinfo: migration })).rejects.toThrow(
      "it has a job already (Outgoing migration)",
    );
    await expect(
      busy({ domjobinfo: migration, "backup-dumpxml": served(`/x/${DEAD}/nbd.sock`) }),
    ).rejects.toThrow("another backup of this domain is running");
  });

  it("whose checkpoint libvirt cannot use has no basis", () => {
    const complaint = "checkpoint inconsistent: missing or broken bitmap 'c' for disk 'vda'";
    const error = new VirshError({ code: "IO", object: "vm1", problem: complaint }, complaint);
    expect(asMissingBasis(error, "c", "do this")).toMatchObject({ code: "NO_BASIS", hint: "do this" });
    expect(asMissingBasis(error, undefined, "")).toBe(error);
  });
});

describe("refuseMethod", () => {
  const buffer = { onBufferFull: "spill", cowBufferSizeBytes: 1 } as const;
  const disk = { name: "vda", format: "raw", isReadOnly: false, isInIothread: true } as const;
  const refused = (
    version: string,
    acceptGuestRisk: boolean,
    job: Partial<Record<keyof typeof buffer, unknown>> = {},
  ) =>
    refuseMethod(new ScriptedVirsh({ version }), [disk], {
      acceptGuestRisk,
      jobs: [{ job: { ...buffer, ...job } as typeof buffer }],
    });

  it("asks where QEMU may end with its NBD client", async () => {
    await expect(refused("Running hypervisor: QEMU 7.2.22\n", false)).rejects.toThrow(
      "give --accept-guest-risk",
    );
    await expect(refused("", false)).rejects.toThrow("give --accept-guest-risk");
    await refused("Running hypervisor: QEMU 7.2.22\n", true);
    await refused("Running hypervisor: QEMU 9.0.0\n", false);
  });

  it("refuses what libvirt cannot do", async () => {
    await expect(refused("", true, { onBufferFull: "wait" })).rejects.toMatchObject({
      object: "--on-buffer-full",
    });
    await expect(refused("", true, { cowBufferSizeBytes: 0 })).rejects.toMatchObject({
      object: "--cow-buffer-size",
    });
  });
});
