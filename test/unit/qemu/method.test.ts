// Which method is chosen for which QEMU, and what is said where none is.
import { describe, expect, it } from "vitest";
import type { QemuDisk, QemuGraph } from "../../../src/qemu/graph.js";
import { chooseMethod, type MethodWish } from "../../../src/qemu/method.js";

const node = {
  name: "drive0",
  driver: "raw",
  filename: "/d.img",
  sizeBytes: 65_536,
  readOnly: false,
  isDirect: false,
  bitmaps: [],
};
const GUEST: QemuDisk = {
  name: "vd0",
  node,
  qdev: "/machine/peripheral/vd0/virtio-backend",
  iothread: undefined,
};
const DAEMON: QemuDisk = { ...GUEST, name: "drive0", qdev: undefined };
const IN_IOTHREAD: QemuDisk = { ...GUEST, iothread: "/objects/io0" };
const BUFFER = { onBufferFull: "spill", cowBufferSizeBytes: 1 } as const;

function qemu(major: number, minor: number, commands = ["qom-set", "blockdev-backup"]): QemuGraph {
  const version = { major, minor };
  return {
    version,
    commands: new Set(commands),
    status: "running",
    devices: [],
    nodes: new Map(),
    edges: [],
  };
}

const daemon = (major: number, minor: number): QemuGraph => qemu(major, minor, ["blockdev-backup"]);

function choose(graph: QemuGraph, disk: QemuDisk, wish: Partial<MethodWish> = {}): string {
  const all: MethodWish = { method: "auto", acceptGuestRisk: false, buffer: BUFFER, ...wish };
  try {
    return chooseMethod(graph, [disk], all).method;
  } catch (error) {
    return (error as Error).message;
  }
}

describe("chooseMethod", () => {
  const risk = { acceptGuestRisk: true };
  const wait = { buffer: { ...BUFFER, onBufferFull: "wait" } } as const;

  it.each([
    ["a guest's disk", qemu(7, 2), GUEST, {}, /^filter$/],
    ["the same, where risk is accepted", qemu(7, 2), GUEST, risk, /^filter$/],
    [
      "a disk in an iothread",
      qemu(7, 2),
      IN_IOTHREAD,
      {},
      /method filter: were this process killed.*aborts.*give --accept-guest-risk, or take the disk/,
    ],
    ["the same, from 9.0 on", qemu(9, 0), IN_IOTHREAD, {}, /^filter$/],
    ["the same, accepted", qemu(7, 2), IN_IOTHREAD, risk, /^filter$/],
    [
      "an older QEMU",
      qemu(6, 2),
      GUEST,
      {},
      /method ring: .*6\.2 would give the guest's writes errors; and not filter, as QEMU 6\.2 has no copy-before-write node/,
    ],
    ["the same, accepted", qemu(6, 2), GUEST, risk, /^ring$/],
    [
      "a daemon's disk",
      daemon(7, 2),
      DAEMON,
      {},
      /method ring: .*and not filter, as no device of a guest.*give --accept-guest-risk/,
    ],
    ["the same, accepted", daemon(7, 2), DAEMON, risk, /^ring$/],
    ["the same, from 10.1 on", daemon(10, 1), DAEMON, {}, /^ring$/],
    [
      "a guest that is to wait for room",
      qemu(7, 2),
      GUEST,
      wait,
      /method ring: .*errors; and not filter, as a guest's write cannot be made to wait/,
    ],
    ["the same, accepted", qemu(7, 2), GUEST, { ...wait, ...risk }, /^ring$/],
    [
      "the same, by filter",
      qemu(7, 2),
      GUEST,
      { ...wait, method: "filter" },
      /method filter: a guest's write cannot be made to wait.*give --on-buffer-full spill or cancel/,
    ],
    [
      "no buffer, by filter",
      qemu(7, 2),
      GUEST,
      { method: "filter", buffer: { ...BUFFER, cowBufferSizeBytes: 0 } },
      /QEMU keeps old data in a file in any case/,
    ],
    [
      "a guest's disk, by ring",
      qemu(7, 2),
      GUEST,
      { method: "ring" },
      /method ring: were this process killed.*7\.2 would give/,
    ],
    [
      "a daemon's disk, by filter",
      daemon(7, 2),
      DAEMON,
      { method: "filter" },
      /^drive0: method filter: no device/,
    ],
    ["the oldest", daemon(5, 1), DAEMON, risk, /5\.1 .*(?:no copy-before-write node|cannot export)/],
  ] as [string, QemuGraph, QemuDisk, Partial<MethodWish>, RegExp][])(
    "%s",
    (_, graph, disk, wish, expected) => {
      expect(choose(graph, disk, wish)).toMatch(expected);
    },
  );
});
