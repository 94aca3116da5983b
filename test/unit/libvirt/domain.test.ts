// What is read of a domain's description, which disks a name means, and what libvirt is given.
import { mkdtempSync, mkdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { backupXml, checkpointXml } from "../../../src/libvirt/documents.js";
import { chooseDisks, parseDomain } from "../../../src/libvirt/domain.js";
import { qemuUser } from "../../../src/libvirt/qemu-process.js";
import { childOf, parseXml } from "../../../src/libvirt/xml.js";

const UUID = "ed9c8ed0-2ffd-45d9-ace5-2c372edbbfc4";

function domainXml(disks: string, attributes = "type='kvm' id='3'", controllers = ""): string {
  return `<domain ${attributes}><name>vm1</name><uuid>${UUID}</uuid><metadata><x:y xmlns:x='u'>z</x:y></metadata>
    <devices><emulator>/usr/bin/qemu</emulator>${disks}${controllers}</devices></domain>`;
}

const QCOW2 = `<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/vm/a.qcow2' index='2'/>
  <backingStore type='file'><format type='raw'/><source file='/vm/base&amp;co.img'/></backingStore>
  <target dev='vda' bus='virtio'/></disk>`;
const RAW = `<disk type='block'><driver name='qemu' type='raw' iothread='1'/><source dev='/dev/vg/b'/><target dev='vdb' bus='virtio'/></disk>`;
const CDROM = `<disk type='file' device='cdrom'><source file='/iso'/><target dev='sda' bus='sata'/><readonly/></disk>`;
const EMPTY = `<disk type='file' device='disk'><target dev='vdc' bus='virtio'/></disk>`;
const READ_ONLY = `<disk type='file'><source file='/ro'/><target dev='vdd' bus='virtio'/><readonly/></disk>`;
const SCSI = `<disk type='file'><source file='/s'/><target dev='sdb' bus='scsi'/><address type='drive' controller='1'/></disk>`;

const names = (disks: readonly { name: string }[]): string[] => disks.map(({ name }) => name);

describe("parseDomain", () => {
  it("has the disks with a medium, their formats, and the files they are made of", () => {
    const domain = parseDomain(domainXml(QCOW2 + RAW + CDROM + EMPTY), "vm1");
    expect(domain).toMatchObject({ name: "vm1", uuid: UUID, isRunning: true });
    expect(domain.disks).toMatchObject([
      { name: "vda", format: "qcow2", isReadOnly: false, isInIothread: false },
      { name: "vdb", format: "raw", isReadOnly: false, isInIothread: true },
    ]);
    expect(domain.files).toEqual(["/vm/a.qcow2", "/vm/base&co.img", "/dev/vg/b", "/iso"]);
  });

  it("knows by the id whether it runs", () => {
    expect(parseDomain(domainXml(QCOW2, "type='kvm'"), "vm1").isRunning).toBe(false);
  });

  it("finds a SCSI disk's thread at its controller", () => {
    const controller = (index: number, driver: string): string =>
      `<controller type='scsi' index='${index}'>${driver}</controller>`;
    const at = (driver: string): boolean | undefined =>
      parseDomain(
        domainXml(SCSI, "id='1'", controller(0, "<driver iothread='9'/>") + controller(1, driver)),
        "vm1",
      ).disks[0]?.isInIothread;
    expect(at("<driver iothread='1'/>")).toBe(true);
    expect(at("<driver queues='2'/>")).toBe(false);
  });
});

describe("chooseDisks", () => {
  const domain = parseDomain(domainXml(QCOW2 + RAW + READ_ONLY), "vm1");

  it("takes names in their order, all that is written, or the only one", () => {
    expect(names(chooseDisks(domain, ["vdd", "vda"], false))).toEqual(["vdd", "vda"]);
    expect(names(chooseDisks(domain, undefined, true))).toEqual(["vda", "vdb"]);
    expect(names(chooseDisks(parseDomain(domainXml(QCOW2 + READ_ONLY), "vm1"), undefined, false))).toEqual([
      "vda",
    ]);
  });

  it("says which there are", () => {
    expect(() => chooseDisks(domain, ["vdx"], false)).toThrow(
      "vdx: vm1 has no such disk (it has vda, vdb, vdd)",
    );
    expect(() => chooseDisks(domain, undefined, false)).toThrow("the domain has several: vda, vdb");
    expect(() => chooseDisks(parseDomain(domainXml(""), "vm1"), undefined, true)).toThrow(
      "no disk that is written",
    );
  });
});

describe("what libvirt is given", () => {
  it("names each disk of the domain, and holds any name", () => {
    const text = backupXml({
      socket: "/var/tmp/it's <here>/nbd.sock",
      disks: [{ name: "vda", scratch: "/a&b/0.scratch" }],
      others: ["vdb"],
      incremental: "cowcatcher-checkpoint-0123456789abcdef",
    });
    const root = parseXml(text, "backup");
    expect(root.attributes.get("mode")).toBe("pull");
    expect(childOf(root, "incremental")?.text).toBe("cowcatcher-checkpoint-0123456789abcdef");
    expect(childOf(root, "server")?.attributes.get("socket")).toBe("/var/tmp/it's <here>/nbd.sock");
    const [disk, other] = childOf(root, "disks")?.children ?? [];
    expect(Object.fromEntries(disk?.attributes ?? [])).toEqual({
      name: "vda",
      backup: "yes",
      type: "file",
      exportname: "vda",
      exportbitmap: "cowcatcher-changes",
    });
    expect(childOf(disk, "scratch")?.attributes.get("file")).toBe("/a&b/0.scratch");
    expect(Object.fromEntries(other?.attributes ?? [])).toEqual({ name: "vdb", backup: "no" });
  });

  it("tracks the same disks, and no other", () => {
    const root = parseXml(
      checkpointXml({ name: "n", description: '{"a":"<b>"}', disks: [{ name: "vda" }], others: ["vdb"] }),
      "checkpoint",
    );
    expect(childOf(root, "description")?.text).toBe('{"a":"<b>"}');
    const disks = childOf(root, "disks")?.children.map(({ attributes }) => attributes.get("checkpoint"));
    expect(disks).toEqual(["bitmap", "no"]);
  });
});

describe("qemuUser", () => {
  const domain = parseDomain(domainXml(QCOW2), "vm1");

  function withProcess(words: readonly string[], uid: number, test: (processes: string) => void): void {
    const folder = mkdtempSync(join(tmpdir(), "cowcatcher-proc-"));
    try {
      mkdirSync(join(folder, "self"));
      mkdirSync(join(folder, "77"));
      mkdirSync(join(folder, "78"));
      writeFileSync(join(folder, "78", "cmdline"), [...words, ""].join("\0"));
      const ids = `Uid:\t0\t1\t2\t${uid}\nGid:\t0\t1\t2\t108\n`;
      writeFileSync(join(folder, "78", "status"), `Name:\tqemu\n${ids}Groups:\t\n`);
      test(folder);
    } finally {
      rmSync(folder, { recursive: true });
    }
  }

  const self = process.getuid?.() ?? 0;

  it("is whose process has the domain's UUID", () => {
    withProcess(["qemu", "-uuid", UUID], 64_055, (processes) => {
      if (self === 0) expect(qemuUser(domain, processes)).toEqual({ uid: 64_055, gid: 108 });
      else expect(() => qemuUser(domain, processes)).toThrow("runs as the user 64055");
    });
    withProcess(["qemu", "-uuid", UUID], self, (processes) => {
      expect(qemuUser(domain, processes)).toBeUndefined();
    });
  });

  it.each([[["qemu", "-uuid", "another"]], [["grep", UUID]], [["qemu", "-uuid"]]])(
    "is nobody here where there is only %j",
    (words) => {
      withProcess(words, 0, (processes) => {
        expect(() => qemuUser(domain, processes)).toThrow("vm1: its QEMU does not run on this machine");
      });
    },
  );
});
