import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { JsonStream } from "../../../src/qmp/json-stream.js";
import type { JsonItem } from "../../../src/qmp/json-stream.js";

const LIMITS = { maxBytes: 1000, maxDepth: 8 };

function feed(bytes: Uint8Array | string, pieceBytes: number, limits = LIMITS): JsonItem[] {
  const stream = new JsonStream(limits);
  const all = Buffer.from(bytes);
  const items: JsonItem[] = [];
  for (let start = 0; start < all.length; start += pieceBytes) {
    items.push(...stream.push(all.subarray(start, start + pieceBytes)));
  }
  return items;
}

const values = (items: JsonItem[]) =>
  items.map((item) => ("value" in item ? item.value : { failed: item.error }));

describe("JsonStream", () => {
  it("splits by braces, not by lines, whatever the packets", () => {
    const text = '{"a":"}{\\"\\\\"}{"b":[{}, "]"]}\r\n\t{\n"c"\n:1}[1]{"ü":"€"}';
    const expected = [{ a: '}{"\\' }, { b: [{}, "]"] }, { c: 1 }, [1], { ü: "€" }];
    for (let pieceBytes = 1; pieceBytes <= Buffer.byteLength(text); pieceBytes++) {
      expect(values(feed(text, pieceBytes))).toEqual(expected);
    }
  });

  it("gives the same items however the input is cut (model)", () => {
    const document = fc.json({ maxDepth: 3 }).map((json) => `{"v":${json}}`);
    const garbage = fc.constantFrom(
      "nonsense ",
      "} ",
      '"str" ',
      "[} ",
      '{"a" 1}',
      '"open\n',
      "\xff",
      "12 ",
      "{]",
    );
    const cuts = fc.array(fc.nat(40), { minLength: 1, maxLength: 20 });
    fc.assert(
      fc.property(fc.array(fc.oneof(document, garbage), { maxLength: 8 }), cuts, (parts, sizes) => {
        const bytes = Buffer.concat(
          parts.map((part) => Buffer.from(part, part === "\xff" ? "latin1" : "utf8")),
        );
        const whole = feed(bytes, bytes.length + 1, { maxBytes: 300, maxDepth: 8 });
        const stream = new JsonStream({ maxBytes: 300, maxDepth: 8 });
        const items: JsonItem[] = [];
        for (let start = 0, turn = 0; start < bytes.length; turn++) {
          const end = start + (sizes[turn % sizes.length] ?? 0) + 1;
          items.push(...stream.push(bytes.subarray(start, end)));
          start = end;
        }
        expect(items).toEqual(whole);
      }),
    );
  });

  it.each([
    ["garbage\n", "JSON parse error, invalid keyword 'garbage'"],
    ["5 ", "QMP input must be a JSON object"],
    ['"text"', "QMP input must be a JSON object"],
    ["} ", "JSON parse error, expecting value"],
    ["@! ", "JSON parse error, stray '@!'"],
  ])("answers %j as QEMU does, and goes on", (text, error) => {
    expect(feed(`${text}{"a":1}`, 3)).toEqual([{ error }, { value: { a: 1 } }]);
  });

  it("costs balanced nonsense one error", () => {
    const items = feed('[}{"a":}{"b":1}', 2);
    expect(items.map((item) => "error" in item)).toEqual([true, true, false]);
    expect(items[2]).toEqual({ value: { b: 1 } });
  });

  it("finds its way back at a line's end inside a string, and at 0xFF", () => {
    const lost = feed('{"a":"unfinished\n{"b":1}', 4);
    expect(lost).toEqual([{ error: "JSON parse error, line feed in a string" }, { value: { b: 1 } }]);
    const cleared = feed(Buffer.from('{"a":[{"\xff{"b":1}', "latin1"), 4);
    expect(cleared).toEqual([{ error: "JSON parse error, stray '\uFFFD'" }, { value: { b: 1 } }]);
  });

  it("refuses bytes that are no UTF-8", () => {
    const items = feed(Buffer.from('{"a":"\xc3("}{"b":1}', "latin1"), 4);
    expect(items).toEqual([{ error: "JSON parse error, invalid UTF-8" }, { value: { b: 1 } }]);
  });

  it("takes a document of exactly the limit, and names the limit one byte later", () => {
    const fits = `{"a":"${"x".repeat(LIMITS.maxBytes - 8)}"}`;
    expect(Buffer.byteLength(fits)).toBe(LIMITS.maxBytes);
    for (const pieceBytes of [1, 7, 5000]) {
      expect(feed(fits, pieceBytes)).toHaveLength(1);
      expect(feed(fits, pieceBytes)[0]).toHaveProperty("value");
      expect(feed(fits.replace("x", "xx") + '{"b":1}', pieceBytes)).toEqual([
        { error: "JSON document size limit of 1000 bytes exceeded" },
        { value: { b: 1 } },
      ]);
    }
  });

  it("refuses deep nesting once and goes on after it", () => {
    const deep = "[".repeat(5000) + "]".repeat(5000);
    expect(feed(`${deep}{"b":1}`, 64)).toEqual([
      { error: "JSON nesting depth limit exceeded" },
      { value: { b: 1 } },
    ]);
  });

  it("answers endless garbage without a space once, in a bounded text", () => {
    const items = feed(`${"x".repeat(100_000)} {"b":1}`, 1024);
    expect(items).toHaveLength(2);
    expect(JSON.stringify(items[0]).length).toBeLessThan(200);
  });
});
