// What a QEMU has: its version, its devices and the nodes below them, and which of these a disk's name means.
//
// Names. A disk of a guest has a node name (`-blockdev`; a generated "#block123" for `-drive`), perhaps a device's name
// (`-drive id=`) and a path in QEMU's object tree ("/machine/peripheral/ID/virtio-backend"); all of these are taken.
// A storage daemon has nodes alone. Main thread.

import { CowcatcherError } from "../errors.js";
import { isJsonObject, type JsonObject, QmpError } from "../qmp/protocol.js";
import { runOf } from "./names.js";
import type { Visit } from "./monitor.js";

export interface QemuVersion {
  major: number;
  minor: number;
}

export interface QemuBitmap {
  name: string;
  isRecording: boolean;
  /** A job or an export uses it. */
  isBusy: boolean;
  /** QEMU has not ended in good order since it was stored. */
  isInconsistent: boolean;
}

export interface QemuNode {
  name: string;
  driver: string;
  filename: string;
  sizeBytes: number;
  readOnly: boolean;
  /** It is opened past the page cache. */
  isDirect: boolean;
  bitmaps: readonly QemuBitmap[];
}

export interface QemuDevice {
  /** Of `-drive`; empty where there is none. */
  device: string;
  /** In the object tree; undefined where nothing of the guest is attached. */
  qdev: string | undefined;
  /** The node at the device's root; undefined: no medium. */
  node: string | undefined;
}

/** From a parent to its child: both are node names, or the parent is what uses a node from outside. */
export interface QemuEdge {
  parent: string;
  child: string;
  role: string;
}

export interface QemuGraph {
  version: QemuVersion;
  /** Commands that it knows: a storage daemon has fewer. */
  commands: ReadonlySet<string>;
  /** Of the guest: "running", "paused", …; undefined in a storage daemon. */
  status: string | undefined;
  devices: readonly QemuDevice[];
  nodes: ReadonlyMap<string, QemuNode>;
  edges: readonly QemuEdge[];
}

/** A disk to be backed up. */
export interface QemuDisk {
  /** What the user calls it, else its device's or node's name. */
  name: string;
  /** The node whose content is the disk. */
  node: QemuNode;
  qdev: string | undefined;
  /** The thread of QEMU that does its I/O, in the object tree; undefined: the main one. */
  iothread: string | undefined;
}

/** @throws CowcatcherError as Visit.execute */
export async function readGraph(visit: Visit): Promise<QemuGraph> {
  const commands = new Set((await visit.list("query-commands")).map(({ name }) => String(name)));
  const [version, nodes, edges] = [
    await readVersion(visit),
    (await visit.list("query-named-block-nodes", { flat: true })).map(readNode),
    commands.has("x-debug-query-block-graph")
      ? readEdges(await visit.execute("x-debug-query-block-graph"))
      : [],
  ];
  const devices = commands.has("query-block") ? (await visit.list("query-block")).map(readDevice) : [];
  const status = commands.has("query-status") ? await readStatus(visit) : undefined;
  return {
    version,
    commands,
    status,
    devices,
    nodes: new Map(nodes.map((node) => [node.name, node])),
    edges,
  };
}

export async function readVersion(visit: Visit): Promise<QemuVersion> {
  const answer = await visit.execute("query-version");
  const qemu = isJsonObject(answer) ? answer["qemu"] : undefined;
  const { major, minor } = isJsonObject(qemu) ? qemu : {};
  return { major: Number(major ?? 0), minor: Number(minor ?? 0) };
}

/** Of the guest: "running", "paused", "shutdown", … */
export async function readStatus(visit: Visit): Promise<string | undefined> {
  const answer = await visit.execute("query-status");
  const status = isJsonObject(answer) ? answer["status"] : undefined;
  return typeof status === "string" ? status : undefined;
}

function readNode(node: JsonObject): QemuNode {
  const image = isJsonObject(node["image"]) ? node["image"] : {};
  return {
    name: textOf(node["node-name"]),
    driver: textOf(node["drv"]),
    filename: textOf(node["file"] ?? image["filename"]),
    sizeBytes: Number(image["virtual-size"] ?? 0),
    readOnly: node["ro"] === true,
    isDirect: isJsonObject(node["cache"]) && node["cache"]["direct"] === true,
    bitmaps: asObjects(node["dirty-bitmaps"]).map(({ name, recording, busy, inconsistent }) => ({
      name: textOf(name),
      isRecording: recording === true,
      isBusy: busy === true,
      isInconsistent: inconsistent === true,
    })),
  };
}

function readDevice({ device, qdev, inserted }: JsonObject): QemuDevice {
  const node = isJsonObject(inserted) ? inserted["node-name"] : undefined;
  return {
    device: typeof device === "string" ? device : "",
    qdev: typeof qdev === "string" && qdev !== "" ? qdev : undefined,
    node: typeof node === "string" ? node : undefined,
  };
}

function readEdges(answer: unknown): QemuEdge[] {
  if (!isJsonObject(answer)) return [];
  const names = new Map<unknown, string>();
  for (const node of asObjects(answer["nodes"])) names.set(node["id"], textOf(node["name"]));
  return asObjects(answer["edges"]).map(({ parent, child, name }) => ({
    parent: names.get(parent) ?? "",
    child: names.get(child) ?? "",
    role: textOf(name),
  }));
}

function textOf(value: unknown): string {
  return typeof value === "string" ? value : "";
}

function asObjects(value: unknown): JsonObject[] {
  return Array.isArray(value) ? value.filter(isJsonObject) : [];
}

export function isAtLeast(version: QemuVersion, major: number, minor: number): boolean {
  return version.major > major || (version.major === major && version.minor >= minor);
}

/**
 * The disk that a name means; without a name the only one that is written.
 * @throws CowcatcherError NOT_FOUND with the names that there are; USAGE where the name is missing; UNSUPPORTED for one without a medium
 */
export async function findDisk(visit: Visit, graph: QemuGraph, name: string | undefined): Promise<QemuDisk> {
  const found = name === undefined ? onlyDisk(visit.path, graph) : namedDisk(visit.path, graph, name);
  const { device, node } = found;
  // Of a dead run nothing is left by now.
  if (runOf(node.name) !== undefined) {
    throw new CowcatcherError({
      code: "BUSY",
      object: name ?? nameOf(found),
      problem: "another backup of this disk is running",
      hint: "wait for its end",
    });
  }
  const qdev = device?.qdev;
  const iothread = qdev === undefined ? undefined : await iothreadOf(visit, qdev);
  return { name: name ?? nameOf(found), node, qdev, iothread };
}

interface FoundDisk {
  device: QemuDevice | undefined;
  node: QemuNode;
}

function nameOf({ device, node }: FoundDisk): string {
  const id = device?.qdev === undefined ? undefined : idOf(device.qdev);
  return (device?.device || undefined) ?? id ?? node.name;
}

/** "vd0" of "/machine/peripheral/vd0/virtio-backend"; undefined where the user gave the device no id. */
function idOf(qdev: string): string | undefined {
  return /^\/machine\/peripheral\/([^/]+)/.exec(qdev)?.[1];
}

function onlyDisk(object: string, graph: QemuGraph): FoundDisk {
  const disks = disksOf(graph).filter(({ node }) => !node.readOnly);
  const [only, ...others] = disks;
  if (only === undefined) {
    throw new CowcatcherError({ code: "NOT_FOUND", object, problem: "it has no disk that is written" });
  }
  if (others.length === 0) return only;
  throw new CowcatcherError({
    code: "USAGE",
    object: "--disk",
    problem: "is missing",
    hint: `QEMU has several: ${disks.map(nameOf).join(", ")}`,
  });
}

/** Names of the disks that are written, each of which findDisk takes. @throws CowcatcherError NOT_FOUND where there is none */
export function diskNames(graph: QemuGraph): string[] {
  const disks = disksOf(graph).filter(({ node }) => !node.readOnly);
  return disks.length === 0 ? [nameOf(onlyDisk("QEMU", graph))] : disks.map(nameOf);
}

/** Disks of the guest; in a storage daemon the nodes that no other node uses. */
function disksOf({ devices, nodes, edges }: QemuGraph): FoundDisk[] {
  if (devices.length > 0) {
    return devices.flatMap((device) => {
      const node = device.node === undefined ? undefined : nodes.get(device.node);
      return node === undefined ? [] : [{ device, node }];
    });
  }
  const used = new Set(edges.filter(({ parent }) => nodes.has(parent)).map(({ child }) => child));
  return [...nodes.values()]
    .filter(({ name }) => !used.has(name) && runOf(name) === undefined)
    .map((node) => ({ device: undefined, node }));
}

function namedDisk(object: string, graph: QemuGraph, name: string): FoundDisk {
  const isMeant = ({ device, qdev, node }: QemuDevice): boolean =>
    device === name || qdev === name || node === name || (qdev !== undefined && idOf(qdev) === name);
  const device = graph.devices.find(isMeant);
  if (device !== undefined && device.node === undefined) {
    throw new CowcatcherError({ code: "UNSUPPORTED", object: name, problem: "the device has no medium" });
  }
  const node = graph.nodes.get(device?.node ?? name);
  if (node !== undefined) return { device, node };
  throw new CowcatcherError({
    code: "NOT_FOUND",
    object: name,
    problem: `the QEMU at ${object} has no disk of this name`,
    hint: `it has ${disksOf(graph).map(nameOf).join(", ") || "none"}`,
  });
}

/**
 * The iothread of a disk: its device's own, or that of the controller above it. QEMU tells of none in query-block, so
 * the object tree is walked up from the device through the bus that it stands on.
 */
async function iothreadOf(visit: Visit, qdev: string): Promise<string | undefined> {
  const places = [qdev];
  const bus = await property(visit, qdev, "parent_bus");
  if (bus !== undefined) places.push(bus);
  for (const place of places) {
    for (let path = place; path.lastIndexOf("/") > 0; path = path.slice(0, path.lastIndexOf("/"))) {
      const iothread = await property(visit, path, "iothread");
      if (iothread !== undefined && iothread !== "") return iothread;
    }
  }
  return undefined;
}

async function property(visit: Visit, path: string, name: string): Promise<string | undefined> {
  try {
    const value = await visit.execute("qom-get", { path, property: name });
    return typeof value === "string" ? value : undefined;
  } catch (error) {
    if (error instanceof QmpError) return undefined;
    throw error;
  }
}
