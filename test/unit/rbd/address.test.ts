// RBD addresses by QEMU's rules (block/rbd.c of QEMU 7.2): what is expected here is what qemu_rbd_parse_filename makes of
// each; test/integration/rbd has QEMU itself read images whose names need escapes.
import fc from "fast-check";
import { describe, expect, it, test } from "vitest";
import { CowcatcherError } from "../../../src/errors.js";
import {
  absoluteRbdAddress,
  formatRbdAddress,
  isRbdAddress,
  mayBeSameImage,
  parseRbdAddress,
  type RbdAddress,
} from "../../../src/rbd/address.js";

const PLAIN: RbdAddress = {
  pool: "p",
  namespace: "",
  image: "i",
  snapshot: undefined,
  user: undefined,
  conf: undefined,
  settings: [],
};

test.each<[string, Partial<RbdAddress>]>([
  ["rbd:p/i", {}],
  ["rbd:p/n/i", { namespace: "n" }],
  // QEMU takes an empty namespace for none.
  ["rbd:p//i", {}],
  ["rbd:p/i@s", { snapshot: "s" }],
  ["rbd:p/n/i@s:id=u", { namespace: "n", snapshot: "s", user: "u" }],
  ["rbd:p/i:id=u:conf=/etc/c", { user: "u", conf: "/etc/c" }],
  ["rbd:p/i:conf=/etc/c:mon_host=h:id=u", { user: "u", conf: "/etc/c", settings: [["mon_host", "h"]] }],
  // The last one counts.
  ["rbd:p/i:id=u:id=v", { user: "v" }],
  ["rbd:p\\/q/i", { pool: "p/q" }],
  ["rbd:p/i\\:j\\@k\\=l\\\\m", { image: "i:j@k=l\\m" }],
  ["rbd:p/i@s\\:t\\@u", { snapshot: "s:t@u" }],
  ["rbd:p/n\\@m/i", { namespace: "n@m" }],
  ["rbd:p/i:mon_host=[v2\\:127.0.0.1\\:3300/0]", { settings: [["mon_host", "[v2:127.0.0.1:3300/0]"]] }],
  // A backslash takes any character's meaning away, and stands for itself at the very end.
  ["rbd:p/i\\j", { image: "ij" }],
  ["rbd:p/i\\", { image: "i\\" }],
  // "=" ends a setting's name only.
  ["rbd:p/i=j:a=b=c", { image: "i=j", settings: [["a", "b=c"]] }],
  // An "@" anywhere begins the snapshot: in a value it needs its backslash.
  ["rbd:p/i:conf=/a@b", { namespace: "i:conf=", image: "a", snapshot: "b" }],
  ["rbd:p/i:conf=/a\\@b", { conf: "/a@b" }],
])("%s", (text, expected) => {
  expect(parseRbdAddress(text)).toEqual({ ...PLAIN, ...expected });
});

test.each([
  ["rbd:", "names no image"],
  ["rbd:p", "names no image"],
  ["rbd:/i", "names no pool"],
  ["rbd:p/", "names no image"],
  ["rbd:p/n/", "names no image"],
  ["rbd:p/i@", "names no snapshot behind '@'"],
  ["rbd:p/i:id", "has the setting 'id' without a value"],
  ["rbd:p/i:id=", "has the setting 'id' without a value"],
  ["rbd:p/i:=v", "has a setting without a name"],
  ["rbd:p/i:", "has the setting '' without a value"],
  ["rbd:p/a/b/c", "has a '/' in the image's name"],
  ["rbd:p/i\0j", "has a NUL character"],
])("%j is refused", (text, problem) => {
  expect(() => parseRbdAddress(text)).toThrow(expect.objectContaining({ code: "USAGE", problem }));
});

it("has a bound", () => {
  const text = `rbd:p/${"i".repeat(5000)}`;
  expect(() => parseRbdAddress(text)).toThrow(/^rbd:p.*…: is longer than 4096 characters/);
});

it("refuses a secret, and does not show it", () => {
  const error = caught(() => parseRbdAddress("rbd:p/i:id=u:key=AQBsecret"));
  expect(error).toMatchObject({ code: "USAGE", hint: expect.stringContaining("keyring=FILE") as string });
  expect(error.message).not.toContain("AQBsecret");
});

describe("an address", () => {
  const name = fc.string({ unit: "grapheme-ascii", minLength: 1, maxLength: 8 });
  const imageName = name.filter((text) => !text.includes("/"));

  it("is read as it was written, whatever its names are", () => {
    fc.assert(
      fc.property(
        fc.record({
          pool: name,
          namespace: fc.oneof(fc.constant(""), name),
          image: imageName,
          snapshot: fc.option(name, { nil: undefined }),
          user: fc.option(name, { nil: undefined }),
          conf: fc.option(name, { nil: undefined }),
          settings: fc.array(
            fc.tuple(
              name.filter((text) => !["id", "conf", "key"].includes(text)),
              name,
            ),
            { maxLength: 3 },
          ),
        }),
        (address) => {
          expect(parseRbdAddress(formatRbdAddress(address))).toEqual(address);
        },
      ),
    );
  });

  it("names the same files from another folder", () => {
    const text = absoluteRbdAddress("rbd:p/i:conf=ceph.conf:keyring=a/b:mon_host=h");
    expect(parseRbdAddress(text)).toEqual({
      ...PLAIN,
      conf: `${process.cwd()}/ceph.conf`,
      settings: [
        ["keyring", `${process.cwd()}/a/b`],
        ["mon_host", "h"],
      ],
    });
  });

  it("is another's image whatever the way to the cluster is", () => {
    const same = (a: string, b: string): boolean => mayBeSameImage(parseRbdAddress(a), parseRbdAddress(b));
    expect(same("rbd:p/i:conf=/a", "rbd:p/i@s:conf=/b")).toBe(true);
    expect(same("rbd:p/i", "rbd:p/n/i")).toBe(false);
    expect(same("rbd:p/i", "rbd:q/i")).toBe(false);
  });

  it("begins with rbd:", () => {
    expect(isRbdAddress("rbd:p/i")).toBe(true);
    expect(isRbdAddress("./rbd:p/i")).toBe(false);
  });
});

function caught(action: () => unknown): CowcatcherError {
  try {
    action();
  } catch (error) {
    if (error instanceof CowcatcherError) return error;
    throw error;
  }
  throw new Error("nothing was thrown");
}
