/** statfs types: ext2 to 4, XFS, Btrfs, tmpfs, F2FS, ZFS, overlayfs, bcachefs. What this machine sees there is what there is. */
export const LOCAL_FILE_SYSTEMS: ReadonlySet<number> = new Set([
  0xef53, 0x58465342, 0x9123683e, 0x01021994, 0xf2f52010, 0x2fc12fc1, 0x794c7630, 0xca451a4e,
]);
