// As much XML as libvirt's documents have: elements, attributes, text, the five entities and character references, comments,
// CDATA, a declaration. libvirt writes them by libxml2, so they are well formed; what is not, or is more than that (a
// document type with entities of its own), is refused. No namespaces: a prefix is a part of the name.

import { CowcatcherError } from "../errors.js";

/** Elements within elements; libvirt's own documents have a dozen. */
const DEPTH_MAX = 200;

export interface XmlElement {
  readonly name: string;
  readonly attributes: ReadonlyMap<string, string>;
  readonly children: readonly XmlElement[];
  /** All of its own text, that of its children not counted. */
  readonly text: string;
}

interface Open {
  name: string;
  attributes: Map<string, string>;
  children: XmlElement[];
  text: string;
}

const NAME = "[A-Za-z_][\\w:.-]*";
/** What can follow at one place, whole: so no part of it is read as something else. */
const TOKEN = new RegExp(
  [
    "<!--(?:(?!--)[^])*-->",
    "<\\?(?:(?!\\?>)[^])*\\?>",
    "<!\\[CDATA\\[((?:(?!\\]\\]>)[^])*)\\]\\]>",
    `</(${NAME})\\s*>`,
    `<(${NAME})((?:\\s+${NAME}\\s*=\\s*(?:"[^"<]*"|'[^'<]*'))*)\\s*(/?)>`,
    "([^<]+)",
  ].join("|"),
  "y",
);
const ATTRIBUTE = new RegExp(`(${NAME})\\s*=\\s*(?:"([^"]*)"|'([^']*)')`, "g");
const ENTITIES: ReadonlyMap<string, string> = new Map([
  ["amp", "&"],
  ["lt", "<"],
  ["gt", ">"],
  ["quot", '"'],
  ["apos", "'"],
]);

/** The root of a document. @throws CowcatcherError PROTOCOL, naming `object`, for what is not such a document */
export function parseXml(text: string, object: string): XmlElement {
  const top: Open = { name: "", attributes: new Map(), children: [], text: "" };
  const open = [top];
  for (let at = 0; at < text.length;) {
    TOKEN.lastIndex = at;
    const token = TOKEN.exec(text);
    const inner = open.at(-1);
    if (token === null || inner === undefined) throw noXml(object, at);
    const [whole, data, closed, name, attributes = "", slash, plain] = token;
    if (data !== undefined) inner.text += data;
    else if (plain !== undefined) inner.text += decode(plain, object, at);
    else if (closed !== undefined) {
      if (open.length < 2 || inner.name !== closed) throw noXml(object, at);
      open.pop();
    } else if (name !== undefined) {
      const element: Open = {
        name,
        attributes: readAttributes(attributes, object, at),
        children: [],
        text: "",
      };
      inner.children.push(element);
      if (slash === "") open.push(element);
      if (open.length > DEPTH_MAX) throw noXml(object, at);
    }
    at += whole.length;
  }
  const [root, ...others] = top.children;
  if (root === undefined || others.length > 0 || open.length > 1 || top.text.trim() !== "")
    throw noXml(object, text.length);
  return root;
}

function readAttributes(text: string, object: string, at: number): Map<string, string> {
  const found = new Map<string, string>();
  for (const [, name = "", double, single] of text.matchAll(ATTRIBUTE)) {
    if (found.has(name)) throw noXml(object, at);
    found.set(name, decode(double ?? single ?? "", object, at));
  }
  return found;
}

function decode(text: string, object: string, at: number): string {
  return text.replace(/&([^;&]*);?/g, (reference, name: string) => {
    const [, hex, decimal] = /^#(?:x([0-9a-fA-F]{1,6})|(\d{1,7}))$/.exec(name) ?? [];
    const digits = hex ?? decimal;
    const code = digits === undefined ? undefined : Number.parseInt(digits, hex === undefined ? 10 : 16);
    const character =
      code === undefined ? ENTITIES.get(name) : code <= 0x10_ff_ff ? String.fromCodePoint(code) : undefined;
    if (character === undefined || !reference.endsWith(";")) throw noXml(object, at);
    return character;
  });
}

function noXml(object: string, at: number): CowcatcherError {
  return new CowcatcherError({
    code: "PROTOCOL",
    object,
    problem: "libvirt's description of it cannot be read as XML",
    offsetBytes: at,
  });
}

/** The child of that name; undefined: there is none. Of several the first. */
export function childOf(element: XmlElement | undefined, name: string): XmlElement | undefined {
  return element?.children.find((child) => child.name === name);
}

/** All elements of that name, at any depth. */
export function* descendants(element: XmlElement, name: string): Generator<XmlElement> {
  for (const child of element.children) {
    if (child.name === name) yield child;
    yield* descendants(child, name);
  }
}

/**
 * Text as it stands in XML, also between quotes of either kind. Line ends and tabs would not outlive an attribute, so they
 * are written by number.
 * @throws CowcatcherError USAGE for a character that XML 1.0 cannot hold at all
 */
export function escapeXml(text: string): string {
  // Exactly these are not XML's Char (XML 1.0, 2.2).
  if (/[\0-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]|\p{Surrogate}/u.test(text)) {
    throw new CowcatcherError({
      code: "USAGE",
      object: text,
      problem: "has a character that libvirt's XML cannot hold",
      hint: "give another name",
    });
  }
  return text.replace(/[&<>"'\t\n\r]/g, (character) => `&#${character.charCodeAt(0)};`);
}
