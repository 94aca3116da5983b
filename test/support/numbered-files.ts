// A Linux guest that writes numbered files, each followed by fsync and a line on its console, and what of them an image
// holds. So of any image of its disk it can be told whether all is there that was committed before an instant.
import { mkdirSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { expect } from "vitest";
import { run } from "./cli.js";
import { mustRun, type Process } from "./server.js";

/** Of each file. */
export const FILE_CHARACTERS = 4096;

/**
 * Writes until "stop" comes on the console, then says "guest: done N"; "guest: cannot …" for whatever went wrong.
 * @param each further commands after each file, whose number is $n
 */
export function writingGuest(each: string): string {
  return `
mount -t ext4 -o noatime /dev/vda /mnt || echo "guest: cannot mount"
( while read -r line; do case $line in mark) : > /mark ;; stop) : > /stop ;; esac; done < /dev/console ) &
n=0
while [ ! -e /stop ]; do
  if [ -e /mark ]; then rm /mark; echo "marked $n"; fi
  n=$((n + 1))
  printf '%${FILE_CHARACTERS}d' $n > /mnt/file$n
  sync /mnt/file$n || { echo "guest: cannot sync"; break; }
  echo "committed $n"
  ${each}
done
umount /mnt || echo "guest: cannot unmount"
dmesg | grep -i 'i/o error' && echo "guest: cannot write without an error"
echo "guest: done $n"
`;
}

/** A raw image with ext4 in it, all of its tables written, with what is in `content`. */
export async function makeExt4(raw: string, sizeBytes: number, content?: string): Promise<void> {
  const from = content === undefined ? [] : ["-d", content];
  const now = "lazy_itable_init=0,lazy_journal_init=0";
  await mustRun("mke2fs", "-q", "-F", "-t", "ext4", "-E", now, ...from, raw, `${sizeBytes / 1024}k`);
}

export async function expectCleanFileSystem(raw: string): Promise<void> {
  const { code, stdout } = await run("e2fsck", ["-fn", raw]);
  expect({ code, stdout }).toEqual({ code: 0, stdout: expect.any(String) as string });
}

/** Contents of the numbered files, read without a mount. @param folder made for them */
export async function filesOf(raw: string, folder: string): Promise<Map<number, string>> {
  mkdirSync(folder);
  await mustRun("debugfs", "-R", `rdump / ${folder}`, raw);
  const files = new Map<number, string>();
  for (const name of readdirSync(folder)) {
    const number = /^file(\d+)$/.exec(name)?.[1];
    if (number !== undefined) files.set(Number(number), readFileSync(join(folder, name), "latin1"));
  }
  return files;
}

export function contentOf(number: number): string {
  return String(number).padStart(FILE_CHARACTERS);
}

/** Of the last line that begins with the word. */
export function lastNumber(guest: Process, word: string): number {
  return numberOf(guest.lines.findLast((line) => line.startsWith(word)) ?? "");
}

export function numberOf(line: string): number {
  return Number(/\d+/.exec(line)?.[0] ?? NaN);
}

/** Waits until the guest has committed so many further files. */
export async function committed(guest: Process, more: number, withinMs: number): Promise<number> {
  const wanted = (lastNumber(guest, "committed") || 0) + more;
  return numberOf(
    await guest.line((line) => line.startsWith("committed") && numberOf(line) >= wanted, 0, withinMs),
  );
}

/** Asks it to stop, and waits for its end. How many files it has written. @throws Error where it met any trouble */
export async function endGuest(guest: Process, withinMs: number): Promise<number> {
  guest.send("stop");
  const written = numberOf(await guest.line((line) => line.startsWith("guest: done"), 0, withinMs));
  expect((await guest.end(withinMs)).code).toBe(0);
  expect(guest.lines.filter((line) => line.startsWith("guest: cannot"))).toEqual([]);
  return written;
}
