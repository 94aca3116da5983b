// The storage by itself, in the guest benchmark: fio on the disk's file, with O_DIRECT and io_uring. What a server of that
// file can give its guest at most.

import type { Contestant } from "./contestant.js";

/** Only for a raw disk: fio knows no formats. */
export function storage(): Contestant {
  return {
    name: "fio on the file",
    hasBackup: false,
    start: ({ disk }) =>
      Promise.resolve({
        child: { cpuSeconds: () => 0 },
        place: { file: disk, by: "direct" },
        startBackup: () => Promise.reject(new Error("a file alone has no backups")),
        stop: () => Promise.resolve(),
      }),
  };
}
