// `serve`: opens the images, serves them to guests over NBD, and takes backup jobs on the control socket.

import { unlinkSync } from "node:fs";
import { absoluteName, leaveWorkingFolder } from "../../file-names.js";
import { LiveHost } from "../../backup/job/live-host.js";
import type { MetricsServer } from "../../control/metrics.js";
import { ControlServer } from "../../control/server.js";
import type { KeySource } from "../../repository/format/keys.js";
import { DiskNode } from "../../cow/disk-node.js";
import type { Image } from "../../block/device.js";
import { describeDirectIo } from "../../block/file/direct-io.js";
import { Qcow2Image } from "../../image/qcow2/image.js";
import { openAnyImage } from "../../repository/open.js";
import { type NbdListener, listenTcp, listenUnix, systemdListeners } from "../../nbd/server/listen.js";
import { processLimit } from "../../process-limits.js";
import { MAX_NEGOTIATING } from "../../nbd/server/limits.js";
import { notifyReady } from "../../nbd/server/notify.js";
import { NbdServer } from "../../nbd/server/server.js";
import { loadTlsCredentials } from "../../nbd/server/tls.js";
import { checkBufferMemory } from "./buffer-memory.js";
import { type CommandContext, printJsonLine, printLine } from "../output/context.js";
import { EXIT } from "../output/exit-codes.js";
import { logLoopDelay } from "./loop-delay.js";
import { openTrackers, type TrackedDisks } from "./serve-tracking.js";
import { warnOfEmptySource } from "./empty-source.js";
import { MOUNTED_SERVED, warnOfMountedSource } from "./source-warnings.js";
import { bitmapContexts, warnOfBitmaps } from "./serve-bitmaps.js";
import { OpenedDisks } from "./opened-disks.js";
import { ServedExports } from "./served-exports.js";
import type { ListenSettings, ServedImage, ServeSettings } from "../options/serve-options.js";
import { onInterrupt } from "../signals.js";
import { packageVersion } from "../version.js";

/** A guest that starts with its server has the processors for itself first, and a server that ends at once boots nothing. */
const WARM_UP_AFTER_MS = 2_000;

/** Resolves to the exit code, when the server has ended. @throws CowcatcherError, which the program reports. */
export async function runServe(
  settings: ServeSettings,
  context: CommandContext,
  repositoryKey?: () => Promise<KeySource | undefined>,
): Promise<number> {
  if (settings.control !== undefined) checkBufferMemory(settings.cowBufferSizeBytes, context.output);
  const images: { served: ServedImage; image: Image }[] = [];
  let tracked: TrackedDisks | undefined;
  let opened: OpenedDisks | undefined;
  const quitting = new Quitting();
  const quit = quitting.ask;
  // `bench` is on the other end of this channel, where there is one: without it the server has no one to serve.
  process.once("disconnect", quit);
  const removeHandlers = onInterrupt(context, {
    onFirst: quit,
    onSecond: () => removeSockets(settings),
    // Whoever rotates logs sends it, or a terminal that goes: no reason to take a guest's disk away.
    onHangUp: context.reopenLog,
  });
  try {
    for (const served of settings.images) {
      const options = {
        repositoryKey,
        format: served.format,
        readOnly: settings.readOnly,
        direct: settings.direct,
        defersWriting: true,
      };
      const image = await quitting.unless(openAnyImage(served.path, options));
      if (image === undefined) return EXIT.done;
      images.push({ served, image });
      warnOfEmptySource(context.output, served.path, image.sizeBytes);
      if (!settings.readOnly) await warnOfMountedSource(context.output, image, MOUNTED_SERVED);
    }
    if (settings.direct) context.logger.debug(await describeDirectIo(), "O_DIRECT");
    for (const { image } of images) warnOfBitmaps(image, context.output);
    tracked = await openTrackers(images, settings.tracking, context);
    for (const { image } of images) if (image instanceof Qcow2Image) await image.beginWriting();
    const trackers = new Map(tracked.byName);
    const nodes = new Map(
      images.map(({ served: { name }, image }) => [
        name,
        new DiskNode(name, image, trackers.get(name) ?? null),
      ]),
    );
    const served = images.map(({ image }) => image);
    const exports = new ServedExports(nodes, bitmapContexts(served, settings.bitmaps));
    const host = new LiveHost(nodes, quit, exports, trackers);
    opened = new OpenedDisks(nodes, trackers, settings, context);
    await serveNodes(settings, context, { exports, opened, host, quitting });
  } finally {
    await opened?.end();
    await tracked?.imagesClose();
    // Flushes: what a guest was told is stored must be, whatever ended the server.
    const closed = await Promise.allSettled(images.map(({ image }) => image.close()));
    // Only what is whole and closed is what the next server will find.
    await tracked?.close();
    // Not before: the first signal after QMP's `quit` must not cut this short.
    removeHandlers();
    process.removeListener("disconnect", quit);
    const failure = closed.find((result) => result.status === "rejected");
    if (failure !== undefined) throw failure.reason;
  }
  return EXIT.done;
}

/** A signal, or QMP's `quit`, which may come at any moment from the start on. */
class Quitting {
  isAsked = false;
  ask: () => void = () => {};
  readonly asked = new Promise<void>((resolve) => {
    this.ask = () => {
      this.isAsked = true;
      resolve();
    };
  });

  /**
   * What the promise is fulfilled with; undefined if quitting was asked for before: a server behind an address may never
   * answer. An image that is opened after that is closed again.
   */
  async unless(opening: Promise<Image>): Promise<Image | undefined> {
    const first = await Promise.race([opening, this.asked.then(() => undefined)]);
    if (first === undefined) {
      opening.then(
        (image) => image.close(),
        () => undefined,
      );
    }
    return first;
  }
}

interface Served {
  exports: ServedExports;
  opened: OpenedDisks;
  host: LiveHost;
  quitting: Quitting;
}

async function serveNodes(
  settings: ServeSettings,
  context: CommandContext,
  { exports, opened, host, quitting }: Served,
): Promise<void> {
  const { logger } = context;
  const tls = settings.tls && loadTlsCredentials(settings.tls);
  const server = new NbdServer({
    exports: exports.byName,
    maxConnections: settings.maxConnections,
    maxNegotiating: negotiatingLimit(),
    logger,
    tls,
  });
  exports.attach(server, opened);
  const control = new ControlServer({
    host,
    logger,
    exports,
    jobDefaults: {
      cowBufferSizeBytes: settings.cowBufferSizeBytes,
      snapshotExport: settings.snapshotExport,
    },
    version: packageVersion(),
  });
  const listeners: NbdListener[] = [];
  const stopLoopDelay = logLoopDelay(logger);
  let metrics: MetricsServer | undefined;
  let warmUp: NodeJS.Timeout | undefined;
  try {
    if (settings.preallocate) {
      await Promise.race([host.preallocate(settings.cowBufferSizeBytes), quitting.asked]);
    }
    listeners.push(...(await listen(settings.listen)));
    host.listensAt(listeners.flatMap(({ place }) => place ?? []));
    if (settings.control !== undefined) await control.listen(settings.control, settings.controlAccess);
    if (settings.metrics !== undefined) {
      const { serveMetrics } = await import("../../control/metrics.js");
      metrics = await serveMetrics(host, packageVersion(), settings.metrics);
    }
    // A folder that is removed while disks are served is none of a backup's business.
    leaveWorkingFolder();
    for (const listener of listeners) listener.serve(server);
    if (!quitting.isAsked) announce(settings, context, listeners);
    // Without a control socket nobody can ask for a backup.
    if (settings.control !== undefined) warmUp = setTimeout(() => void host.warmUp(), WARM_UP_AFTER_MS);
    await quitting.asked;
  } finally {
    clearTimeout(warmUp);
    stopLoopDelay();
    metrics?.close();
    await Promise.all(listeners.map((listener) => listener.close()));
    // Jobs first: a guest that waits for one is let go, so that its last requests can be answered.
    await host.close();
    await server.close();
    await control.close();
  }
}

/** Clients that say nothing must leave descriptors for those that do, and for backups. */
function negotiatingLimit(): number {
  const openFileLimit = processLimit("Max open files") ?? Infinity;
  return Math.max(1, Math.min(MAX_NEGOTIATING, Math.floor(openFileLimit / 4)));
}

async function listen(settings: ListenSettings): Promise<NbdListener[]> {
  switch (settings.type) {
    case "unix":
      return [await listenUnix(settings.path, { mode: settings.mode, groupId: settings.groupId })];
    case "tcp":
      return [await listenTcp(settings.address, settings.port)];
    case "inherited":
      return systemdListeners();
  }
}

function announce(
  settings: ServeSettings,
  { output, logger }: CommandContext,
  listeners: readonly NbdListener[],
): void {
  const addresses = listeners.map(({ address }) => address);
  const names = settings.images.map(({ name }) => name);
  if (output.json) {
    printJsonLine(output, {
      message_type: "listening",
      addresses,
      exports: names,
      control: settings.control ?? null,
    });
  } else if (!output.quiet && settings.listen.type !== "inherited") {
    // Whoever hands over a socket knows it, and may use the same standard output for something else.
    printLine(output, `listening on ${addresses.join(", ")} (${names.join(", ")})`);
  }
  notifySystemd(logger);
}

function notifySystemd(logger: CommandContext["logger"]): void {
  try {
    notifyReady();
  } catch (error) {
    // Without libc there is no way to say so; the disks are served all the same.
    logger.warn({ err: error }, "systemd was not told that the server is ready");
  }
}

/** The process ends at once: the sockets' files would stay. */
function removeSockets({ listen, control }: ServeSettings): void {
  for (const path of [listen.type === "unix" ? listen.path : undefined, control]) {
    if (path === undefined) continue;
    try {
      unlinkSync(absoluteName(path));
    } catch {
      // Gone already.
    }
  }
}
