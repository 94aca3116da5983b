// The names of the methods, apart from what they do: the command line knows them before anything of QEMU is loaded.

export const QEMU_METHODS = ["auto", "ring", "filter"] as const;
export type QemuMethod = (typeof QEMU_METHODS)[number];
