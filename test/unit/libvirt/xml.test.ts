// The XML that libvirt writes is read, what is no such XML is refused, and what we write is read again as it was.
import { describe, expect, it } from "vitest";
import { childOf, descendants, escapeXml, parseXml } from "../../../src/libvirt/xml.js";

const parse = (text: string) => parseXml(text, "doc");

describe("parseXml", () => {
  it("reads elements, attributes in either quotes, text, entities, comments and CDATA", () => {
    const root = parse(
      `<?xml version="1.0"?>\n<!-- <a> --><a x='1 > 0' y="it's"><b/>t&amp;&#x41;&#66;<ns:b k=''>v</ns:b><![CDATA[<&]]></a>\n`,
    );
    expect([...root.attributes]).toEqual([
      ["x", "1 > 0"],
      ["y", "it's"],
    ]);
    expect(root.text).toBe("t&AB<&");
    expect(childOf(root, "ns:b")?.text).toBe("v");
    expect(childOf(root, "c")).toBeUndefined();
  });

  it("finds elements at any depth, in order", () => {
    const root = parse("<a><s n='1'/><b><s n='2'><s n='3'/></s></b></a>");
    expect([...descendants(root, "s")].map(({ attributes }) => attributes.get("n"))).toEqual(["1", "2", "3"]);
  });

  it.each([
    "",
    "text",
    "<a>",
    "</a>",
    "<a></b>",
    "<a/><b/>",
    "<a/>text",
    "<a x=1/>",
    "<a x='1' x='2'/>",
    "<a x='<'/>",
    "<a>&nbsp;</a>",
    "<a>&amp</a>",
    "<a>&#x110000;</a>",
    "<!DOCTYPE a [<!ENTITY e 'x'>]><a>&e;</a>",
    "<!-- -- --><a/>",
    "<a><![CDATA[</a>",
    "<a>".repeat(300) + "</a>".repeat(300),
  ])("refuses %j", (text) => {
    expect(() => parse(text)).toThrow(expect.objectContaining({ code: "PROTOCOL", object: "doc" }));
  });

  it("takes a time that grows with the text, not with its square", () => {
    const text = `<a x='${"y".repeat(200_000)}'>${"<b/>".repeat(50_000)}${"<".repeat(1000)}`;
    expect(() => parse(text)).toThrow();
  });
});

describe("escapeXml", () => {
  it.each([`a&b<c>d"e'f`, "two\nlines\tand\rmore", "größe 😀", " blank "])(
    "%j comes back, from an attribute and from text",
    (text) => {
      const root = parse(`<a x='${escapeXml(text)}' y="${escapeXml(text)}">${escapeXml(text)}</a>`);
      expect([root.attributes.get("x"), root.attributes.get("y"), root.text]).toEqual([text, text, text]);
    },
  );

  it.each(["\0", "a\u001b", "\ufffe", "\ud800", "\udce9"])("refuses %j, which XML cannot hold", (text) => {
    expect(() => escapeXml(text)).toThrow(expect.objectContaining({ code: "USAGE" }));
  });
});
