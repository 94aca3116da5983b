#!/usr/bin/env node
// The program's entry. It loads the rest, and does so by itself: where there are not even the descriptors for that, no
// module of ours is there to say so.
import { readFileSync } from "node:fs";
import { keepIgnored } from "./ignored-signals.js";

// First, as until then a signal that is to be ignored ends the process.
keepIgnored(process.env);

// To read it takes a descriptor.
const openFilesLine = readLimit();

import("./start.js")
  .then(({ start }) => start())
  .catch((error: unknown) => {
    if (!isOutOfDescriptors(error)) throw error;
    sayTooManyFiles();
    process.exit(1);
  });

function sayTooManyFiles(): void {
  const limit = /\d+/.exec(openFilesLine)?.[0];
  const count = limit === undefined ? "" : `this process may have ${limit}; `;
  process.stderr.write(
    `cowcatcher: too many open files (${count}raise RLIMIT_NOFILE, by ulimit -n or LimitNOFILE= of the systemd unit)\n`,
  );
}

function readLimit(): string {
  try {
    return /^Max open files.*$/m.exec(readFileSync("/proc/self/limits", "utf8"))?.[0] ?? "";
  } catch {
    return "";
  }
}

function isOutOfDescriptors(error: unknown): boolean {
  return error instanceof Error && "code" in error && error.code === "EMFILE";
}
