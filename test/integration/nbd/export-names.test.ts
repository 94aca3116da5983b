// Export names are no paths: the one that the URI says is the one that is read or written.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, describe, expect, it } from "vitest";
import { cowcatcher } from "../../support/cli.js";
import { nbdkit } from "../../support/nbd-servers.js";
import { stopAll, scratchFolder } from "../../support/server.js";

afterEach(stopAll);

/** Each export reads as a letter of its own. */
const PREAD =
  'case "$2" in x/../a) c=B;; a) c=A;; ..) c=P;; "") c=D;; *) c=U;; esac; head -c $3 /dev/zero | tr "\\0" $c';

describe("backup of an NBD export", () => {
  it.each([
    ["x/../a", "B"],
    ["x/%2E./a", "B"],
    ["a", "A"],
    ["..", "P"],
    ["%2E%2E", "P"],
    ["", "D"],
    ["./a", "U"],
    ["%252E%252E", "U"],
  ])("reads '%s', not what a path of that form would lead to", async (name, letter) => {
    const { socket } = await nbdkit("eval", 'open=echo "$3"', "get_size=echo 4096", `pread=${PREAD}`);
    const target = join(scratchFolder(), "t.raw");
    const result = await cowcatcher(["backup", `nbd+unix:///${name}?socket=${socket}`, target]);
    expect(result.stderr).toBe("");
    expect(readFileSync(target, "latin1")).toBe(letter.repeat(4096));
  });
});
