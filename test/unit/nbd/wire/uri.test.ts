// NBD URIs: the name that is written is the export that is asked for, whatever it looks like.
import { describe, expect, it } from "vitest";
import type { CowcatcherError } from "../../../../src/errors.js";
import { formatNbdUri, parseNbdUri } from "../../../../src/nbd/wire/uri.js";

function problemOf(uri: string): string {
  try {
    parseNbdUri(uri);
  } catch (error) {
    return (error as CowcatcherError).message;
  }
  return "none";
}

describe("the export's name in an NBD URI", () => {
  it.each([
    ["x/../a", "x/../a"],
    ["..", ".."],
    [".", "."],
    ["%2E%2E", ".."],
    ["%2e%2e/a", "../a"],
    ["./a", "./a"],
    ["a/./b//c/", "a/./b//c/"],
    ["a\\..\\b", "a\\..\\b"],
    ["%252e", "%2e"],
    ["a%2Fb", "a/b"],
    ["a%3Fb%23c", "a?b#c"],
    ["a b\tc", "a b\tc"],
    ["ä", "ä"],
    ["a@b:c", "a@b:c"],
    ["a'\"<>`{}|^", "a'\"<>`{}|^"],
    ["A", "A"],
  ])("'%s' is '%s', percent-decoded once and nothing else", (raw, exportName) => {
    expect(parseNbdUri(`nbd+unix:///${raw}?socket=/s`)).toEqual({ path: "/s", exportName });
    expect(parseNbdUri(`nbd://h/${raw}`)).toEqual({ host: "h", port: 10_809, exportName });
    const written = formatNbdUri({ path: "/s", exportName });
    expect(parseNbdUri(written)).toEqual({ path: "/s", exportName });
  });

  it("ends at nothing that is not seen to end it", () => {
    expect(problemOf("nbd://h/a#b")).toContain("%23");
    expect(problemOf("nbd+unix:///a#b?socket=/s")).toContain("%23");
    expect(problemOf("nbd://h/a%00b")).toContain("zero byte");
    expect(problemOf("nbd://h/a%zz")).toContain("percent-encoding");
    expect(problemOf("nbd://h/%ff")).toContain("percent-encoding");
  });
});

describe("the socket of an NBD URI", () => {
  it.each(["/a/../b/s", "./s", "../s", "/a//s", "/s\\..\\t", "/s t"])("'%s' is left as it is", (path) => {
    expect(parseNbdUri(`nbd+unix:///?socket=${path}`)).toEqual({ path, exportName: "" });
  });
});

describe("the authority of an NBD URI", () => {
  it("may be empty, which means this machine", () => {
    for (const uri of ["nbd://", "nbd:///", "nbd+tcp://"]) {
      expect(parseNbdUri(uri)).toEqual({ host: "localhost", port: 10_809, exportName: "" });
    }
    expect(parseNbdUri("nbd://:10888/x")).toEqual({ host: "localhost", port: 10_888, exportName: "x" });
  });

  it("may be a literal address, with a zone", () => {
    const linkLocal = "nbd://[fe80::1%25eth0]:7/x";
    expect(parseNbdUri(linkLocal)).toEqual({ host: "fe80::1%eth0", port: 7, exportName: "x" });
    expect(formatNbdUri(parseNbdUri(linkLocal))).toBe(linkLocal);
  });

  it("keeps a user with an @ and a colon in the name", () => {
    expect(parseNbdUri("nbds://a%40b:c@h/x").tls?.username).toBe("a@b:c");
    expect(parseNbdUri("nbds+unix://alice@?socket=/s").tls?.username).toBe("alice");
  });

  it.each([
    "nbd://h:65536/",
    "nbd://h:x/",
    "nbd://a:1:2/",
    "nbd://[::1/",
    "nbd://[h]/",
    "nbd://a%2Fb/",
    "nbd://a b/",
  ])("is refused where it is none: %s", (uri) => {
    expect(problemOf(uri)).not.toBe("none");
  });

  it("has a port alone for no Unix socket", () => {
    expect(problemOf("nbd+unix://:1/x?socket=/s")).toContain("three slashes");
  });
});
