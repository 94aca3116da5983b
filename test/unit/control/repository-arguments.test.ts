import { describe, expect, it } from "vitest";
import type { RepositoryPlace } from "../../../src/backup/options.js";
import { argumentsFromRepository, repositoryFrom } from "../../../src/control/repository-arguments.js";

const PLACE: RepositoryPlace = {
  address: "/backup/repo",
  group: "vm1",
  disk: "root",
  level: "incremental",
  keyFile: "/key",
  passphraseFile: undefined,
  vmConfig: "<domain/>",
  tool: "cowcatcher 1",
};
const GIVEN = { target: "/backup/repo", sync: "full", "x-group": "vm1" };

describe("drive-backup into a repository", () => {
  it("means what was asked for, through the socket", () => {
    const sent = {
      ...JSON.parse(JSON.stringify(argumentsFromRepository(PLACE))),
      sync: "full",
    } as typeof GIVEN;
    expect(repositoryFrom(sent, "node", "cowcatcher 1")).toEqual(PLACE);
    expect(repositoryFrom(GIVEN, "node", "t")).toMatchObject({ disk: "node", level: "auto" });
  });

  it.each<[object, string]>([
    [{ "x-group": undefined, "x-level": "full" }, "'x-level' needs 'x-group'"],
    [{ "x-force": true }, "'x-force' with 'x-group'"],
    [{ "x-since": "daily" }, "'x-since' with 'x-group'"],
    [{ sync: "top" }, "sync mode 'top'"],
    [{ "on-target-error": "ignore" }, "on-target-error 'ignore'"],
    [{ "x-key-file": "/a", "x-passphrase-file": "/b" }, "does not go with"],
    [{ "x-group": "../vm" }, "../vm"],
    [{ "x-disk-name": "a/b" }, "a/b"],
    [{ target: "s3:ftp://host/b" }, "s3:ftp"],
  ])("refuses %j", (more, message) => {
    expect(() => repositoryFrom({ ...GIVEN, ...more }, "node", "t")).toThrow(message);
  });
});
