// What libvirt is given: which disks are backed up where, and what is tracked from then on. Both go in one call, so that both
// are of one instant. (https://libvirt.org/formatbackup.html, https://libvirt.org/formatcheckpoint.html)

import { escapeXml } from "./xml.js";

/** The name of the bitmap that is exported with each disk. */
export const CHANGES = "cowcatcher-changes";

export interface BackupDocument {
  /** Where QEMU is to listen. */
  socket: string;
  /** In the domain, and the files that take what the guest overwrites. */
  disks: readonly { name: string; scratch: string }[];
  /** Disks of the domain that take no part. */
  others: readonly string[];
  /** The checkpoint since which changes are exported; undefined: none are. */
  incremental: string | undefined;
}

/** @throws CowcatcherError USAGE for a name that XML cannot hold */
export function backupXml({ socket, disks, others, incremental }: BackupDocument): string {
  return [
    "<domainbackup mode='pull'>",
    ...(incremental === undefined ? [] : [`  <incremental>${escapeXml(incremental)}</incremental>`]),
    `  <server transport='unix' socket='${escapeXml(socket)}'/>`,
    "  <disks>",
    ...disks.flatMap(({ name, scratch }) => [
      `    <disk name='${escapeXml(name)}' backup='yes' type='file' exportname='${escapeXml(name)}'` +
        `${incremental === undefined ? "" : ` exportbitmap='${CHANGES}'`}>`,
      `      <scratch file='${escapeXml(scratch)}'/>`,
      "    </disk>",
    ]),
    ...others.map((name) => `    <disk name='${escapeXml(name)}' backup='no'/>`),
    "  </disks>",
    "</domainbackup>",
    "",
  ].join("\n");
}

export interface CheckpointDocument {
  name: string;
  description: string;
  disks: readonly { name: string }[];
  others: readonly string[];
}

/** @throws as backupXml */
export function checkpointXml({ name, description, disks, others }: CheckpointDocument): string {
  return [
    "<domaincheckpoint>",
    `  <name>${escapeXml(name)}</name>`,
    `  <description>${escapeXml(description)}</description>`,
    "  <disks>",
    ...disks.map((disk) => `    <disk name='${escapeXml(disk.name)}' checkpoint='bitmap'/>`),
    ...others.map((disk) => `    <disk name='${escapeXml(disk)}' checkpoint='no'/>`),
    "  </disks>",
    "</domaincheckpoint>",
    "",
  ].join("\n");
}
