// Preloaded by scripts/code-cache.mjs into a process and its threads: what V8 has made of each file of a bundle is
// written beside it as the process ends, and as a thread answers. Then it has the functions that were called, too.
"use strict";
const { mkdirSync, writeFileSync } = require("node:fs");
const { basename, dirname, join } = require("node:path");
const vm = require("node:vm");
const { isMainThread } = require("node:worker_threads");

const dist = join(__dirname, "../dist");
const folder = `code-cache/${process.versions.v8}-${process.arch}`;
const scripts = new Map();

vm.Script = class extends vm.Script {
  constructor(code, options) {
    super(code, options);
    if (options?.filename?.endsWith(".cjs")) scripts.set(options.filename, this);
  }
};

function write() {
  for (const [file, script] of scripts) {
    const place = join(dist, dirname(file), folder);
    mkdirSync(place, { recursive: true });
    writeFileSync(join(place, basename(file)), script.createCachedData());
  }
}

if (isMainThread) {
  process.on("exit", write);
} else {
  const { postMessage } = MessagePort.prototype;
  MessagePort.prototype.postMessage = function (...message) {
    write();
    return postMessage.apply(this, message);
  };
}
