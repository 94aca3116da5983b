import { describe, expect, it } from "vitest";
import { PROBE_BYTES, probeFormat, probeSignature } from "../../../src/image/probe.js";

function sectorWith(text: string, offset = 0): Uint8Array {
  const sector = Buffer.alloc(PROBE_BYTES, 0);
  sector.write(text, offset, "latin1");
  return sector;
}

describe("probeFormat", () => {
  it.each([2, 3])("takes qcow2 version %i", (version) => {
    expect(probeFormat("disk", sectorWith(`QFI\xfb\0\0\0${String.fromCharCode(version)}`))).toBe("qcow2");
  });

  it("takes what has no known header as raw, even an empty or a tiny file", () => {
    expect(probeFormat("disk", sectorWith("\xeb\x63\x90"))).toBe("raw");
    expect(probeFormat("disk", new Uint8Array(0))).toBe("raw");
    expect(probeFormat("disk", Uint8Array.from([0x51, 0x46, 0x49]))).toBe("raw");
  });

  it.each([
    ["qcow", sectorWith("QFI\xfb\0\0\0\x01")],
    ["vmdk", sectorWith("KDMV")],
    ["vdi", sectorWith("\x7f\x10\xda\xbe", 0x40)],
    ["vhdx", sectorWith("vhdxfile")],
    ["vpc", sectorWith("conectix")],
    ["qed", sectorWith("QED\0")],
    ["parallels", sectorWith("WithoutFreeSpace")],
    ["bochs", sectorWith("Bochs Virtual HD Image")],
    ["cloop", sectorWith("#!/bin/sh\n#V2.0 Format\n")],
  ])("refuses %s by name", (format, sector) => {
    expect(() => probeFormat("disk", sector)).toThrow(`disk: the image is in the format '${format}'`);
  });

  it("says of LUKS what can be done with it", () => {
    const probe = () => probeFormat("disk", sectorWith("LUKS\xba\xbe\0\x01"));
    expect(probe).toThrow(/^disk: the image is encrypted \(LUKS\).* \(give -f raw/);
  });

  it.each([
    ["# Disk DescriptorFile\nversion=1\n", "vmdk"],
    ["# any\r\n   \nversion=3\r\n", "vmdk"],
    ["version=2\n", "vmdk"],
    ["version=5\n", "raw"],
    ["# any\nCID=1\nversion=1\n", "raw"],
  ])("knows VMDK's text form: %j is %s", (text, format) => {
    expect(probeSignature(sectorWith(text))).toBe(format);
  });
});
