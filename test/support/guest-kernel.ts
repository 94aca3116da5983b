// A Linux guest under QEMU whose disk is one of `serve`'s exports: kernel and busybox from Debian
// (scripts/guest-kernel.sh), an initramfs made here, and the serial console as the way in and out.
import { spawnSync } from "node:child_process";
import { accessSync, constants, existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { homedir } from "node:os";
import { join, resolve } from "node:path";
import { Process } from "./server.js";

const QEMU = "qemu-system-x86_64";
/** In the order in which they need each other. */
const MODULES = [
  "virtio_ring",
  "virtio",
  "virtio_pci_modern_dev",
  "virtio_pci_legacy_dev",
  "virtio_pci",
  "virtio_blk",
];
/** Of the kernel and busybox, 30 MB. */
const DOWNLOAD_MS = 120_000;

export type Accelerator = "kvm" | "tcg";

export interface GuestKernel {
  folder: string;
  /** In the order in which they are tried. TCG is slower, needs no privilege, and works everywhere. */
  accelerators: readonly Accelerator[];
}

/** What a kernel takes until its first process speaks, on a machine that has other things to do. */
const BOOT_MS: Record<Accelerator, number> = { kvm: 60_000, tcg: 240_000 };
const READY = "guest: ready";

/** The kernel, fetched if it is not there yet; or why there is none. */
export function findGuestKernel(): GuestKernel | { missing: string } {
  if (spawnSync(QEMU, ["--version"]).status !== 0) {
    return { missing: `${QEMU} is not installed (apt-get install qemu-system-x86)` };
  }
  const cache = process.env["XDG_CACHE_HOME"] ?? join(homedir(), ".cache");
  const folder = process.env["COWCATCHER_GUEST_KERNEL"] ?? join(cache, "cowcatcher", "guest-kernel");
  const script = resolve(import.meta.dirname, "../../scripts/guest-kernel.sh");
  const fetched = spawnSync("bash", [script, folder], { encoding: "utf8", timeout: DOWNLOAD_MS });
  if (fetched.status !== 0) {
    const reason = fetched.stderr.trim().split("\n").at(-1) ?? "";
    return { missing: `no kernel could be had for the guest: ${reason}` };
  }
  return { folder, accelerators: usableAccelerators() };
}

/** A /dev/kvm without hardware behind it (a paravirtual one) boots no ordinary kernel. COWCATCHER_GUEST_ACCEL chooses. */
function usableAccelerators(): Accelerator[] {
  const asked = process.env["COWCATCHER_GUEST_ACCEL"];
  if (asked === "kvm" || asked === "tcg") return [asked];
  try {
    accessSync("/dev/kvm", constants.R_OK | constants.W_OK);
    const hasHardware = /^flags.*\b(vmx|svm)\b/m.test(readFileSync("/proc/cpuinfo", "utf8"));
    return hasHardware ? ["kvm", "tcg"] : ["tcg"];
  } catch {
    return ["tcg"];
  }
}

/**
 * Boots the kernel with `script`, run by busybox's shell as the first process; its lines are the process's lines.
 * Resolves when the script begins. @throws Error with what the console said if it does not.
 */
export async function bootGuest(kernel: GuestKernel, options: GuestOptions): Promise<Process> {
  writeFileSync(options.initramfs, makeInitramfs(kernel.folder, options.script));
  let failure: unknown;
  for (const accelerator of kernel.accelerators) {
    const guest = startQemu(kernel.folder, accelerator, options);
    try {
      await guest.line((line) => line.startsWith(READY), 0, BOOT_MS[accelerator]);
      return guest;
    } catch (error) {
      failure = error;
      guest.kill("SIGKILL");
      await guest.end();
    }
  }
  throw failure;
}

function startQemu(
  folder: string,
  accelerator: Accelerator,
  { initramfs, socket, exportName, reconnectDelaySeconds }: GuestOptions,
): Process {
  const reconnect = reconnectDelaySeconds === undefined ? "" : `,reconnect-delay=${reconnectDelaySeconds}`;
  const server = `server.type=unix,server.path=${socket},export=${exportName}`;
  const disk = `driver=nbd,node-name=disk,${server},discard=unmap${reconnect}`;
  return new Process(QEMU, [
    ...["-accel", accelerator, "-m", "256"],
    ...["-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"],
    ...["-kernel", join(folder, "vmlinuz"), "-initrd", initramfs],
    ...["-append", "console=ttyS0 quiet panic=-1"],
    ...["-blockdev", disk, "-device", "virtio-blk-pci,drive=disk"],
  ]);
}

export interface GuestOptions {
  /** What the guest does once /proc, /sys and /dev are there and its disk is /dev/vda. */
  script: string;
  /** Path where the initramfs goes. */
  initramfs: string;
  socket: string;
  exportName: string;
  /** How long QEMU waits for a server that is gone; undefined: the guest's requests fail at once. */
  reconnectDelaySeconds?: number;
}

function makeInitramfs(folder: string, script: string): Buffer {
  const modules = MODULES.filter((name) => existsSync(join(folder, `${name}.ko`)));
  const init = [
    "#!/bin/busybox sh",
    "/bin/busybox --install -s /bin",
    "export PATH=/bin",
    "mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev",
    ...modules.map((name) => `insmod /${name}.ko`),
    "tries=0; until [ -b /dev/vda ] || [ $tries -ge 600 ]; do sleep 0.1; tries=$((tries + 1)); done",
    `echo "${READY}"`,
    script,
    "poweroff -f",
    "",
  ].join("\n");
  return cpio([
    ...["bin", "proc", "sys", "dev", "mnt"].map((name) => ({
      name,
      mode: 0o040755,
      content: Buffer.alloc(0),
    })),
    { name: "bin/busybox", mode: 0o100755, content: readFileSync(join(folder, "busybox")) },
    ...readdirSync(folder)
      .filter((name) => name.endsWith(".ko"))
      .map((name) => ({ name, mode: 0o100644, content: readFileSync(join(folder, name)) })),
    { name: "init", mode: 0o100755, content: Buffer.from(init) },
  ]);
}

interface Entry {
  name: string;
  mode: number;
  content: Buffer;
}

/** An archive in cpio's "newc" form, as the kernel's buffer-format document describes it. */
function cpio(entries: readonly Entry[]): Buffer {
  const end = { name: "TRAILER!!!", mode: 0, content: Buffer.alloc(0) };
  return Buffer.concat([...entries, end].map((entry, index) => cpioEntry(entry, index + 1)));
}

function cpioEntry({ name, mode, content }: Entry, inode: number): Buffer {
  const nameBytes = name.length + 1;
  // Inode, mode, uid, gid, links, mtime, file size, device numbers (four), name size, checksum.
  const fields = [inode, mode, 0, 0, 1, 0, content.length, 0, 0, 0, 0, nameBytes, 0];
  const header = `070701${fields.map((field) => field.toString(16).padStart(8, "0")).join("")}${name}\0`;
  return Buffer.concat([padded(Buffer.from(header)), padded(content)]);
}

/** To a multiple of four bytes. */
function padded(bytes: Buffer): Buffer {
  return Buffer.concat([bytes, Buffer.alloc((4 - (bytes.length % 4)) % 4)]);
}
