// Names are bytes: nothing on the way from a header, a folder or an argument to a system call may change one.
import { spawnSync } from "node:child_process";
import { mkdirSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, it } from "vitest";
import fc from "fast-check";
import {
  absoluteName,
  besides,
  decodeName,
  exactArguments,
  isTextName,
  nameBytes,
  printableName,
  systemName,
  workingFolder,
} from "../../src/file-names.js";

const folder = mkdtempSync(join(tmpdir(), "names-"));
afterAll(() => {
  rmSync(folder, { recursive: true });
});

describe("a file's name", () => {
  it("comes back from any bytes, and from text", () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 40 }), (bytes) => {
        expect(nameBytes(decodeName(Buffer.from(bytes)))).toEqual(Buffer.from(bytes));
      }),
    );
    fc.assert(
      fc.property(fc.string({ unit: "binary" }), (text) => {
        expect(decodeName(nameBytes(text))).toBe(text);
      }),
    );
  });

  it("is Latin-1, cut UTF-8, overlong UTF-8 or a surrogate's bytes, and stays so", () => {
    for (const hex of ["636166e9", "e2 82", "c0 af", "ed a0 80", "f4 90 80 80", "61 ff 62", "e2 82 ac e9"]) {
      const bytes = Buffer.from(hex.replaceAll(" ", ""), "hex");
      const name = decodeName(bytes);
      expect(isTextName(name)).toBe(false);
      expect(systemName(name)).toEqual(bytes);
    }
    expect(decodeName(Buffer.from("€/😀"))).toBe("€/😀");
    expect(systemName("€/😀")).toBe("€/😀");
    expect(printableName(decodeName(Buffer.from("caf\xe9", "latin1")))).toBe("caf\\xe9");
  });

  it("is put together as the kernel reads it, dot segments and all", () => {
    expect(besides("/images/link/top", "../base")).toBe("/images/link/../base");
    expect(besides("top", "base")).toBe("base");
    expect(besides("/top", "/a//b")).toBe("/a//b");
    expect(absoluteName("/a/../b/")).toBe("/a/../b/");
    expect(absoluteName("//a/.//./b/./c")).toBe("/a/b/c");
    expect(absoluteName("./link/../b")).toBe(`${process.cwd()}/link/../b`);
  });

  it("is right where the working folder's and the arguments' bytes are no text", () => {
    const odd = Buffer.concat([Buffer.from(`${folder}/caf`), Buffer.of(0xe9)]);
    mkdirSync(odd);
    // A program started from there, in C's locale of bytes.
    const script = `
      const { workingFolder, exactArguments, nameBytes } = await import("${process.cwd()}/dist/src/file-names.js");
      console.log(JSON.stringify([workingFolder(), ...exactArguments(process.argv.slice(2))]
        .map((name) => nameBytes(name).toString("hex"))));`;
    const shell = `cd "$(printf '${folder}/caf\\351')" && exec node --input-type=module -e "$0" x a "$(printf 'b\\377')" ''`;
    const { stdout, stderr } = spawnSync("sh", ["-c", shell, script], { encoding: "utf8" });
    expect(stderr).toBe("");
    // With -e the first argument is process.argv[1].
    expect(JSON.parse(stdout)).toEqual([odd.toString("hex"), "61", "62ff", ""]);
    expect(workingFolder()).toBe(process.cwd());
    expect(exactArguments(["x", "\uFFFD"])).toEqual(["x", "\uFFFD"]);
  });
});
