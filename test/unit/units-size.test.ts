// Sizes as qemu-img takes them.
import { expect, it } from "vitest";
import { parseSize } from "../../src/units.js";

it.each([
  ["0x10000", 65536],
  ["0XfF", 255],
  ["0x1E", 30],
  ["0x1B", 27],
  ["4P", 4 * 2 ** 50],
  ["1.5p", 1.5 * 2 ** 50],
  ["0.001E", Math.round(0.001 * 2 ** 60)],
  ["64K", 65536],
])("%s is %i bytes", (text, bytes) => {
  expect(parseSize(text, "size")).toBe(bytes);
});

it.each(["0x", "0xg", "0x1.8", "-0x10", "0x10k", "1e3", "K", ""])("'%s' is no size", (text) => {
  expect(() => parseSize(text, "size")).toThrow(/is not a size/);
});

it.each(["32P", "8E", "8P", "0x7fffffffffffffff"])("%s is more than there is, and that is said", (text) => {
  expect(() => parseSize(text, "size")).toThrow(/more than any size here, 8 PiB/);
});
