// Addresses of RBD images, in QEMU's form:
//
//   rbd:POOL[/NAMESPACE]/IMAGE[@SNAPSHOT][:id=USER][:conf=FILE][:KEY=VALUE…]
//
// QEMU's rules (block/rbd.c, qemu_rbd_parse_filename): a backslash takes the next character's meaning away; the pool ends
// at the first '/'; if an '@' stands anywhere behind it the image ends there and the snapshot at the next ':', else the
// image ends at the first ':'; a '/' within the image parts the namespace from it. What follows are settings of Ceph's,
// a name up to '=' and a value up to ':'.
//
// What QEMU takes and is refused here: empty names, and `key=`, a secret that every user of the machine could read in the
// list of processes.

import { absoluteName } from "../file-names.js";
import { CowcatcherError } from "../errors.js";

const SCHEME = "rbd:";
/** A whole address; Ceph's own names are shorter. Bounds what is parsed and shown. */
const MAX_ADDRESS_LENGTH = 4096;
const SECRET_SETTINGS = new Set(["key"]);
/** Settings whose value is a file, so that a server in another folder finds it. */
const FILE_SETTINGS = new Set(["keyring", "keyfile"]);

export interface RbdAddress {
  pool: string;
  /** "" for the pool's default namespace. */
  namespace: string;
  image: string;
  snapshot: string | undefined;
  /** Of client.USER; undefined: Ceph's default, admin. */
  user: string | undefined;
  /** Undefined: Ceph's default places. */
  conf: string | undefined;
  /** Further settings of Ceph's, in the order given. */
  settings: readonly (readonly [name: string, value: string])[];
}

export function isRbdAddress(text: string): boolean {
  return text.startsWith(SCHEME);
}

/** @throws CowcatcherError USAGE, naming the address and what is wrong with it. */
export function parseRbdAddress(text: string): RbdAddress {
  if (!isRbdAddress(text)) throw wrongAddress(text, "does not begin with rbd:");
  if (text.length > MAX_ADDRESS_LENGTH) {
    throw wrongAddress(`${text.slice(0, 60)}…`, `is longer than ${MAX_ADDRESS_LENGTH} characters`);
  }
  if (text.includes("\0")) throw wrongAddress(text, "has a NUL character");
  const [poolText, rest] = cut(text.slice(SCHEME.length), "/");
  if (rest === undefined) throw wrongAddress(text, "names no image");
  const hasSnapshot = indexOfPlain(rest, "@") >= 0;
  const [pathText, behindPath] = cut(rest, hasSnapshot ? "@" : ":");
  const [snapshotText, settingsText] = hasSnapshot ? cut(behindPath ?? "", ":") : [undefined, behindPath];
  const [first, second] = cut(pathText, "/");
  const address: RbdAddress = {
    pool: unescape(poolText),
    namespace: second === undefined ? "" : unescape(first),
    image: unescape(second ?? first),
    snapshot: snapshotText === undefined ? undefined : unescape(snapshotText),
    user: undefined,
    conf: undefined,
    settings: [],
  };
  if (address.pool === "") throw wrongAddress(text, "names no pool");
  if (address.image === "") throw wrongAddress(text, "names no image");
  if (address.image.includes("/")) throw wrongAddress(text, "has a '/' in the image's name");
  if (address.snapshot === "") throw wrongAddress(text, "names no snapshot behind '@'");
  return { ...address, ...parseSettings(settingsText, text) };
}

function parseSettings(
  settingsText: string | undefined,
  text: string,
): Pick<RbdAddress, "user" | "conf" | "settings"> {
  let user: string | undefined;
  let conf: string | undefined;
  const settings: [string, string][] = [];
  for (let rest = settingsText; rest !== undefined;) {
    const [nameText, behindName] = cut(rest, "=");
    const name = unescape(nameText);
    if (behindName === undefined) throw wrongAddress(text, `has the setting '${name}' without a value`);
    const [valueText, next] = cut(behindName, ":");
    const value = unescape(valueText);
    if (name === "") throw wrongAddress(text, "has a setting without a name");
    if (value === "") throw wrongAddress(text, `has the setting '${name}' without a value`);
    if (SECRET_SETTINGS.has(name)) throw secretAddress(text, name);
    if (name === "id") user = value;
    else if (name === "conf") conf = value;
    else settings.push([name, value]);
    rest = next;
  }
  return { user, conf, settings };
}

/** The inverse of parseRbdAddress. */
export function formatRbdAddress(address: RbdAddress): string {
  const { pool, namespace, image, snapshot, user, conf, settings } = address;
  const space = namespace === "" ? "" : `${escapeName(namespace)}/`;
  const name = `${SCHEME}${escapeName(pool)}/${space}${escapeName(image)}`;
  const all = [
    ...(user === undefined ? [] : [["id", user] as const]),
    ...(conf === undefined ? [] : [["conf", conf] as const]),
    ...settings,
  ];
  const tail = all.map(([key, value]) => `:${escape(key)}=${escape(value)}`).join("");
  return `${name}${snapshot === undefined ? "" : `@${escape(snapshot)}`}${tail}`;
}

/** For a process with another working folder. @throws as parseRbdAddress. */
export function absoluteRbdAddress(text: string): string {
  const address = parseRbdAddress(text);
  return formatRbdAddress({
    ...address,
    conf: address.conf === undefined ? undefined : absoluteName(address.conf),
    settings: address.settings.map(([name, value]) => [
      name,
      FILE_SETTINGS.has(name) ? absoluteName(value) : value,
    ]),
  });
}

/** Files that the address names, each with the setting that names it. */
export function filesOfAddress({ conf, settings }: RbdAddress): (readonly [setting: string, path: string])[] {
  const named = settings.filter(([name]) => FILE_SETTINGS.has(name));
  return conf === undefined ? named : [["conf", conf], ...named];
}

/** "POOL/IMAGE" or "POOL/NAMESPACE/IMAGE", with "@SNAPSHOT" behind it, as Ceph's own tools write it. */
export function imageSpec({ pool, namespace, image, snapshot }: RbdAddress): string {
  const path = [pool, namespace, image].filter((part) => part !== "").join("/");
  return snapshot === undefined ? path : `${path}@${snapshot}`;
}

/**
 * Whether two addresses may mean the same image. Two configurations may lead to one cluster, so it goes by the image's
 * place alone: to call two images one is a refusal with a hint, to call one two would be the end of it.
 */
export function mayBeSameImage(a: RbdAddress, b: RbdAddress): boolean {
  return a.pool === b.pool && a.namespace === b.namespace && a.image === b.image;
}

/** The text up to the first delimiter without a backslash before it, and what is behind it. */
function cut(text: string, delimiter: string): [string, string | undefined] {
  const at = indexOfPlain(text, delimiter);
  return at < 0 ? [text, undefined] : [text.slice(0, at), text.slice(at + 1)];
}

function indexOfPlain(text: string, character: string): number {
  for (let i = 0; i < text.length; i++) {
    if (text[i] === character) return i;
    if (text[i] === "\\" && i + 1 < text.length) i++;
  }
  return -1;
}

/** A backslash at the very end stands for itself. */
function unescape(text: string): string {
  return text.replace(/\\(.)/gs, "$1");
}

function escape(text: string): string {
  return text.replace(/[\\:@=]/g, "\\$&");
}

/** Of pool, namespace, image. */
function escapeName(text: string): string {
  return escape(text).replaceAll("/", "\\/");
}

function wrongAddress(object: string, problem: string): CowcatcherError {
  return new CowcatcherError({
    code: "USAGE",
    object,
    problem,
    hint: "give rbd:POOL[/NAMESPACE]/IMAGE[@SNAP][:id=USER][:conf=FILE], with a backslash before ':', '@', '=' in names",
  });
}

/** The address is not shown: it has the secret in it. */
function secretAddress(text: string, name: string): CowcatcherError {
  return new CowcatcherError({
    code: "USAGE",
    object: `${cut(text.slice(SCHEME.length), ":")[0]}`,
    problem: `'${name}=' would show a secret to every user of this machine`,
    hint: "put it into a file, and give keyring=FILE or keyfile=FILE",
  });
}
