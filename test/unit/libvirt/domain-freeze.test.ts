// The freeze through libvirt, with a script in virsh's place: it freezes a file, and writes down when each call begins and ends.
import { chmodSync, existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, expect, it, vi } from "vitest";
import { whileFrozen } from "../../../src/backup/job/while-frozen.js";
import { CowcatcherError } from "../../../src/errors.js";
import { DomainFreeze, thawDomain } from "../../../src/libvirt/domain-freeze.js";
import { Virsh } from "../../../src/libvirt/virsh.js";
import { until } from "../../support/server.js";

const VIRSH = `#!/bin/sh
cd "$(dirname "$0")"
command=$3
echo "begin $command" >> log
answer() { echo "end $command" >> log; echo "$2"; exit "$1"; }
[ -e fails-$command ] && { cat fails-$command >&2; answer 1; }
case $command in
  domfsinfo) [ -e frozen ] && { echo "error: Command guest-get-fsinfo has been disabled" >&2; answer 1; }; answer 0;;
  domfsfreeze)
    while [ -e hold ]; do sleep 0.02; done
    touch frozen; answer 0 "Froze 3 filesystem(s)";;
  domfsthaw)
    [ -e frozen ] && { rm frozen; answer 0 "Thawed $(cat thawed 2>/dev/null || echo 3) filesystem(s)"; }
    answer 0 "Thawed 0 filesystem(s)";;
esac
`;

const listenersBefore = process.listeners("exit");
/** What has been left for the process's end. */
const atExit = (): NodeJS.ExitListener[] =>
  process.listeners("exit").filter((listener) => !listenersBefore.includes(listener));
let folder = "";
const at = (name: string): string => join(folder, name);
const log = (): string[] => (existsSync(at("log")) ? readFileSync(at("log"), "utf8").trim().split("\n") : []);
const isFrozen = (): boolean => existsSync(at("frozen"));
const virsh = (): Virsh => new Virsh("qemu:///system", "vm1");

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "cowcatcher-domfs-"));
  writeFileSync(at("virsh"), VIRSH);
  chmodSync(at("virsh"), 0o755);
  vi.stubEnv("PATH", `${folder}:${process.env["PATH"] ?? ""}`);
});
afterEach(() => {
  for (const listener of atExit()) process.removeListener("exit", listener);
  vi.unstubAllEnvs();
  rmSync(folder, { recursive: true, force: true });
});

async function errorOf(work: Promise<unknown>): Promise<CowcatcherError> {
  return work.then(
    () => expect.fail("it succeeded"),
    (error: unknown) => error as CowcatcherError,
  );
}

it("has T0 in a frozen guest, and tells how many file systems held", async () => {
  const freeze = new DomainFreeze(virsh());
  await freeze.check();
  expect(await whileFrozen(freeze, () => Promise.resolve(isFrozen()))).toBe(true);
  expect(isFrozen()).toBe(false);
  expect(freeze.info).toMatchObject({ fileSystemCount: 3, isHeld: true });
  writeFileSync(at("thawed"), "1");
  await whileFrozen(freeze, () => Promise.resolve());
  expect(freeze.info).toMatchObject({ fileSystemCount: 3, isHeld: false });
});

it("thaws when the step fails, and when the freeze does, whose words are shown", async () => {
  const failure = new CowcatcherError({ code: "IO", object: "disk", problem: "is gone" });
  expect(await errorOf(whileFrozen(new DomainFreeze(virsh()), () => Promise.reject(failure)))).toBe(failure);
  expect(isFrozen()).toBe(false);
  writeFileSync(at("fails-domfsfreeze"), "error: Unable to freeze filesystems\nerror: timed out");
  const error = await errorOf(whileFrozen(new DomainFreeze(virsh()), () => Promise.resolve()));
  expect(error.message).toContain("virsh domfsfreeze: Unable to freeze filesystems: timed out");
  expect(log().slice(-2)).toEqual(["begin domfsthaw", "end domfsthaw"]);
});

it("leaves a guest alone that somebody else has frozen", async () => {
  writeFileSync(at("frozen"), "");
  const error = await errorOf(whileFrozen(new DomainFreeze(virsh()), () => Promise.resolve()));
  expect(error).toMatchObject({ code: "BUSY", object: "vm1" });
  expect(isFrozen()).toBe(true);
  expect(log()).toEqual(["begin domfsinfo", "end domfsinfo"]);
});

it("says what the domain lacks", async () => {
  writeFileSync(at("fails-domfsinfo"), "error: argument unsupported: QEMU guest agent is not configured");
  const error = await errorOf(new DomainFreeze(virsh()).check());
  expect(error).toMatchObject({ code: "UNSUPPORTED", object: "vm1" });
  expect(error.message).toContain(
    "the guest cannot be frozen: argument unsupported: QEMU guest agent is not",
  );
});

it("sends the thaw behind a freeze that was given up, never before it", async () => {
  writeFileSync(at("hold"), "");
  const interruption = new AbortController();
  const step = vi.fn(() => Promise.resolve());
  const freezing = errorOf(whileFrozen(new DomainFreeze(virsh()), step, interruption.signal));
  await until("the guest freezes", () => log().includes("begin domfsfreeze"));
  interruption.abort(new CowcatcherError({ code: "CANCELLED", object: "vm1", problem: "given up" }));
  // Whoever did not wait would have begun to thaw by the end of another call.
  await virsh().run("domfsinfo");
  expect(log()).not.toContain("begin domfsthaw");
  rmSync(at("hold"));
  expect(await freezing).toMatchObject({ code: "CANCELLED" });
  expect(step).not.toHaveBeenCalled();
  expect(isFrozen()).toBe(false);
});

it("gives a freeze up that takes too long, and thaws", async () => {
  writeFileSync(at("hold"), "");
  const error = await errorOf(whileFrozen(new DomainFreeze(virsh(), 100), () => Promise.resolve()));
  expect(error.message).toContain("libvirt gave no answer within 0.1 s");
  expect(log().slice(-2)).toEqual(["begin domfsthaw", "end domfsthaw"]);
});

it("leaves a thaw behind when the process ends while the guest freezes, and when it is frozen", async () => {
  writeFileSync(at("hold"), "");
  const freeze = new DomainFreeze(virsh());
  const freezing = freeze.freeze();
  await until("the guest freezes", () => log().includes("begin domfsfreeze"));
  atExit()[0]?.(0);
  rmSync(at("hold"));
  await freezing;
  await until("it is thawed", () => log().includes("end domfsthaw"));
  expect(log().indexOf("begin domfsthaw")).toBeGreaterThan(log().indexOf("end domfsfreeze"));
  expect(isFrozen()).toBe(false);
  writeFileSync(at("frozen"), "");
  atExit()[0]?.(0);
  await until("it is thawed again", () => !isFrozen());
  await freeze.thaw();
  expect(atExit()).toEqual([]);
});

it("tries again, then says that the guest may be frozen, and what to do", async () => {
  writeFileSync(at("fails-domfsthaw"), "error: QEMU guest agent is not connected");
  const error = await errorOf(whileFrozen(new DomainFreeze(virsh()), () => Promise.resolve()));
  expect(error.message).toContain("vm1: the guest may still be frozen, as it could not be thawed");
  expect(error.hint).toBe("run: virsh --connect qemu:///system domfsthaw vm1");
  expect(log().filter((line) => line === "begin domfsthaw")).toHaveLength(3);
  rmSync(at("fails-domfsthaw"));
  expect(await thawDomain(virsh())).toBe(3);
});
