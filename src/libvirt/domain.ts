// What libvirt says of a domain: whether it runs, and its disks. `virsh domblklist` does not tell formats and threads, so
// the domain's description is read. (https://libvirt.org/formatdomain.html)

import type { ImageFormat } from "../block/format.js";
import { CowcatcherError } from "../errors.js";
import type { Virsh } from "./virsh.js";
import { childOf, descendants, parseXml, type XmlElement } from "./xml.js";

/** A disk of a domain, as libvirt names it: by its target, such as "vda". */
export interface DomainDisk {
  readonly name: string;
  readonly format: ImageFormat;
  /** The guest does not write it. */
  readonly isReadOnly: boolean;
  /** QEMU does its I/O in a thread of its own. */
  readonly isInIothread: boolean;
}

/** A disk to be backed up. */
export interface SizedDisk extends DomainDisk {
  readonly node: { readonly sizeBytes: number };
}

export interface Domain {
  readonly name: string;
  readonly uuid: string;
  readonly isRunning: boolean;
  /** Those with a medium; neither CD-ROMs nor floppies. */
  readonly disks: readonly DomainDisk[];
  /** Files and devices that the disks are made of, backing files included. */
  readonly files: readonly string[];
}

/** @throws CowcatcherError as Virsh.run; PROTOCOL */
export async function readDomain(virsh: Virsh): Promise<Domain> {
  return parseDomain(await virsh.run("dumpxml"), virsh.domain);
}

/** @throws CowcatcherError PROTOCOL */
export function parseDomain(text: string, object: string): Domain {
  const root = parseXml(text, object);
  const devices = childOf(root, "devices");
  const elements = devices?.children.filter(({ name }) => name === "disk") ?? [];
  return {
    name: childOf(root, "name")?.text ?? object,
    uuid: childOf(root, "uuid")?.text ?? "",
    // Only of a domain that runs libvirt tells an id.
    isRunning: root.attributes.has("id"),
    disks: elements.flatMap((element) => readDisk(element, devices)),
    files: elements.flatMap((element) => [...descendants(element, "source")]).flatMap(filesOf),
  };
}

function filesOf({ attributes }: XmlElement): string[] {
  return ["file", "dev"].flatMap((name) => attributes.get(name) ?? []);
}

function readDisk(element: XmlElement, devices: XmlElement | undefined): DomainDisk[] {
  const { attributes } = element;
  const kind = attributes.get("device") ?? "disk";
  const target = childOf(element, "target")?.attributes;
  const name = target?.get("dev");
  if ((kind !== "disk" && kind !== "lun") || name === undefined || childOf(element, "source") === undefined)
    return [];
  const driver = childOf(element, "driver");
  const controller = target?.get("bus") === "scsi" ? scsiController(element, devices) : undefined;
  return [
    {
      name,
      format: driver?.attributes.get("type") === "qcow2" ? "qcow2" : "raw",
      isReadOnly: childOf(element, "readonly") !== undefined,
      isInIothread: hasIothread(driver) || hasIothread(childOf(controller, "driver")),
    },
  ];
}

function hasIothread(driver: XmlElement | undefined): boolean {
  return driver?.attributes.has("iothread") === true || childOf(driver, "iothreads") !== undefined;
}

/** A SCSI disk's requests are its controller's. */
function scsiController(disk: XmlElement, devices: XmlElement | undefined): XmlElement | undefined {
  const index = childOf(disk, "address")?.attributes.get("controller") ?? "0";
  return devices?.children.find(
    ({ name, attributes }) =>
      name === "controller" && attributes.get("type") === "scsi" && attributes.get("index") === index,
  );
}

/**
 * The disks that the names mean, in their order; without names the only one that is written, or all of them.
 * @throws CowcatcherError NOT_FOUND with the names that there are; USAGE where one has to be named, or is twice
 */
export function chooseDisks(
  { name: object, disks }: Domain,
  names: readonly string[] | undefined,
  isAll: boolean,
): DomainDisk[] {
  const written = disks.filter(({ isReadOnly }) => !isReadOnly);
  const known = disks.map(({ name }) => name).join(", ");
  if (names === undefined) {
    if (written.length === 0)
      throw new CowcatcherError({ code: "NOT_FOUND", object, problem: "it has no disk that is written" });
    if (written.length === 1 || isAll) return written;
    const hint = `the domain has several: ${written.map(({ name }) => name).join(", ")}`;
    throw new CowcatcherError({ code: "USAGE", object: "--disk", problem: "is missing", hint });
  }
  return names.map((name) => {
    const found = disks.find((disk) => disk.name === name);
    if (found !== undefined) return found;
    const hint = known === "" ? "it has none" : `it has ${known}`;
    const problem = `${object} has no such disk`;
    throw new CowcatcherError({ code: "NOT_FOUND", object: name, problem, hint });
  });
}

/** @throws CowcatcherError as Virsh.run; PROTOCOL */
export async function withSize(virsh: Virsh, disk: DomainDisk): Promise<SizedDisk> {
  const answer = await virsh.run("domblkinfo", `--device=${disk.name}`);
  const sizeBytes = Number(/^Capacity:\s+(\d+)$/m.exec(answer)?.[1] ?? Number.NaN);
  if (!Number.isSafeInteger(sizeBytes)) {
    const problem = "virsh domblkinfo does not say how large the disk is";
    throw new CowcatcherError({ code: "PROTOCOL", object: disk.name, problem });
  }
  return { ...disk, node: { sizeBytes } };
}
