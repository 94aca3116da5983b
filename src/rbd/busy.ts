// Threads that may sit in a call of librbd's. A process that ends while they do would wait for them, or would run Ceph's
// own exit handlers under them: it ends at once then (backup/copy/thread-boots.ts). No imports: the program's entry has
// this module.

let busyCount = 0;

export function keeperIsBusy(): boolean {
  return busyCount > 0;
}

export function noteKeeperBusy(): void {
  busyCount++;
}

export function noteKeeperIdle(): void {
  busyCount--;
}
