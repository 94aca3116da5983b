// A libvirt of the test's own: the real libvirtd as a user's session, with all of its files in one folder, and a domain whose
// QEMU (TCG, no operating system) has a second monitor, by which the test writes as the guest does. libvirtd as root keeps its
// files in the system's folders, so a test that runs as root has it run as nobody.
import { chownSync, existsSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { run, type RunResult } from "./cli.js";
import { Qemu } from "./qemu.js";
import { mustRun, Process, until } from "./server.js";

const NOBODY = 65_534;
const isRoot = process.getuid?.() === 0;
const DOMAIN = "guest";

export interface DomainDiskOptions {
  format: "raw" | "qcow2";
  isInIothread?: boolean;
}

export interface DomainOptions {
  sizeBytes: number;
  disks: readonly DomainDiskOptions[];
}

export class Libvirt {
  readonly folder: string;
  readonly name = DOMAIN;
  /** For `--connect`. */
  readonly uri: string;
  readonly #process: Process;
  #domains = 0;

  private constructor(folder: string) {
    this.folder = folder;
    const run = join(folder, "run");
    this.uri = `qemu+unix:///session?socket=${join(run, "libvirt", "libvirt-sock")}`;
    const config = join(folder, "config", "libvirt");
    for (const path of [run, config, join(folder, "vm")]) mkdirSync(path, { recursive: true });
    const settings = ['security_driver = "none"', 'stdio_handler = "file"', "namespaces = []"];
    writeFileSync(join(config, "qemu.conf"), `${settings.join("\n")}\ncgroup_controllers = []\n`);
    this.#giveAway(folder, run, join(folder, "config"), config, join(folder, "vm"));
    const words = ["libvirtd", "--timeout", "120"];
    const user = ["setpriv", `--reuid=${NOBODY}`, `--regid=${NOBODY}`, "--clear-groups"];
    const [program = "", ...args] = isRoot ? [...user, ...words] : words;
    this.#process = new Process(program, args, {
      HOME: folder,
      PATH: `${process.env["PATH"] ?? ""}:/usr/sbin:/sbin`,
      XDG_RUNTIME_DIR: run,
      XDG_CONFIG_HOME: join(folder, "config"),
      XDG_CACHE_HOME: join(folder, "cache"),
      XDG_DATA_HOME: join(folder, "data"),
    });
  }

  static async start(): Promise<Libvirt> {
    // Its sockets' paths are long, and a socket's path may not be.
    const libvirt = new Libvirt(mkdtempSync("/tmp/cc-lv-"));
    await until("libvirt answers", async () => {
      if (libvirt.#process.over) throw new Error(libvirt.#process.stderr);
      return (await libvirt.try("version")).code === 0;
    });
    return libvirt;
  }

  /** A folder or file becomes QEMU's user's. */
  #giveAway(...paths: string[]): void {
    if (isRoot) for (const path of paths) chownSync(path, NOBODY, NOBODY);
  }

  virsh(...args: string[]): Promise<string> {
    return mustRun("virsh", "--quiet", "--connect", this.uri, ...args);
  }

  try(...args: string[]): Promise<RunResult> {
    return run("virsh", ["--quiet", "--connect", this.uri, ...args]);
  }

  /** Defines and starts the domain anew; the test's hand in it. */
  async startDomain({ sizeBytes, disks }: DomainOptions): Promise<Qemu> {
    await this.endDomain();
    const folder = join(this.folder, "vm", String(this.#domains++));
    mkdirSync(folder);
    this.#giveAway(folder);
    const parts: string[] = [];
    for (const [index, { format, isInIothread }] of disks.entries()) {
      const path = join(folder, `disk${index}.img`);
      await mustRun("qemu-img", "create", "-q", "-f", format, path, String(sizeBytes));
      this.#giveAway(path);
      const iothread = isInIothread === true ? " iothread='1'" : "";
      parts.push(
        `<disk type='file' device='disk'><driver name='qemu' type='${format}'${iothread}/><source file='${path}'/>` +
          `<target dev='vd${"abc"[index]}' bus='virtio'/></disk>`,
      );
    }
    const monitor = join(folder, "own.sock");
    const description = join(this.folder, "domain.xml");
    writeFileSync(
      description,
      `<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>${DOMAIN}</name>
        <memory unit='MiB'>64</memory><vcpu>1</vcpu><iothreads>1</iothreads>
        <os><type arch='x86_64' machine='q35'>hvm</type></os>
        <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>${parts.join("")}
        <memballoon model='none'/></devices>
        <qemu:commandline><qemu:arg value='-qmp'/><qemu:arg value='unix:${monitor},server=on,wait=off'/>
        </qemu:commandline></domain>`,
    );
    await this.virsh("define", description);
    await this.virsh("start", DOMAIN);
    return Qemu.start(folder, {
      sizeBytes,
      diskCount: disks.length,
      foreign: {
        ownMonitor: monitor,
        log: join(this.folder, "cache", "libvirt", "qemu", "log", `${DOMAIN}.log`),
        qdevs: disks.map((_, index) => `/machine/peripheral/virtio-disk${index}/virtio-backend`),
      },
    });
  }

  async endDomain(): Promise<void> {
    await this.try("destroy", DOMAIN);
    const names = (await this.try("checkpoint-list", DOMAIN, "--name")).stdout.split("\n");
    for (const name of names)
      if (name !== "") await this.try("checkpoint-delete", DOMAIN, name, "--metadata");
    await this.try("undefine", DOMAIN);
  }

  /** Names of the domain's checkpoints. */
  async checkpoints(): Promise<string[]> {
    const names = (await this.virsh("checkpoint-list", DOMAIN, "--name")).split("\n");
    return names.filter((name) => name !== "");
  }

  /** "None", or what job the domain has. */
  async job(): Promise<string | undefined> {
    return /^Job type:\s+(\S+)/m.exec(await this.virsh("domjobinfo", DOMAIN))?.[1];
  }

  async stop(): Promise<void> {
    await this.endDomain();
    if (!this.#process.over) this.#process.kill("SIGTERM");
    await this.#process.end();
    if (existsSync(this.folder)) rmSync(this.folder, { recursive: true });
  }
}
