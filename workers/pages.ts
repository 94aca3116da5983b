// Makes the pages of a copy-before-write buffer ready ahead of the captures (src/cow/buffer-pages.ts). It never touches
// source or target, so it always ends when it is told to.

import { bootIsOver } from "../src/backup/copy/thread-boots.js";
import { preparePages, type PageTask } from "../src/cow/buffer-pages.js";
import { libc } from "../src/native/libc.js";

bootIsOver();

export default function pages(task: PageTask): void {
  // As in copy.ts: from here on.
  if (task.niceness > 0) libc?.setThreadNice(task.niceness);
  preparePages(task);
}
