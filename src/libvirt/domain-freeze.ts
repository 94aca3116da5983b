// The guest's file systems are frozen for T0 through libvirt, which has the guest agent's channel for itself (`--freeze libvirt`),
// and thawed whatever happens. Main thread.
//
//   check    domfsinfo: is there an agent? One whose guest is frozen refuses it
//   freeze   domfsfreeze ─┐
//   thaw     ……………………………┴─► domfsthaw, up to three times
//
// libvirt itself has one command after another go to the agent, but two calls of virsh may reach it in either order: so the
// thaw waits for the end of the freeze's call, also where that was given up. When the process ends meanwhile a shell stays
// behind that does the same. Only `kill -9` leaves a guest frozen: `virsh domfsthaw`, or `--cleanup --freeze libvirt`, thaws it.
//
// The commands are libvirt's own and not qemu-agent-command, which would mark the domain as tainted. How long the agent may take is
// then libvirt's to say (without end, unless `virsh guest-agent-timeout` was given); virsh is not waited for that long.

import type { FreezeInfo, GuestFreezer } from "../backup/job/while-frozen.js";
import { CowcatcherError, toCowcatcherError } from "../errors.js";
import { orAborted } from "../qemu/guest-freeze.js";
import { type Virsh, VirshError } from "./virsh.js";

/** In the place of the agent's socket: the channel is libvirt's. */
export const THROUGH_LIBVIRT = "libvirt";

/** libvirt waits 30 s for another command to the agent, and the agent answers at once. */
const STATUS_MS = 45_000;
/** Everything that the guest has not written yet is written first. */
const FREEZE_MS = 60_000;
const THAW_TRIES = 3;

export class DomainFreeze implements GuestFreezer {
  readonly path: string;
  readonly #virsh: Virsh;
  readonly #freezeMs: number;
  #startMs: number | undefined;
  #freezing: Promise<string> = Promise.resolve("");
  #frozenCount = 0;
  info: FreezeInfo | undefined;

  /** @param freezeMs the longest that a freeze may take; another one only in tests */
  constructor(virsh: Virsh, freezeMs = FREEZE_MS) {
    this.path = virsh.domain;
    this.#virsh = virsh;
    this.#freezeMs = freezeMs;
  }

  async check(): Promise<void> {
    try {
      await this.#virsh.runWithin(STATUS_MS, "domfsinfo");
    } catch (error) {
      throw asAgentsError(error, this.path);
    }
  }

  async freeze(signal?: AbortSignal): Promise<void> {
    await this.check();
    signal?.throwIfAborted();
    this.#startMs = performance.now();
    process.on("exit", this.#atExit);
    this.#freezing = this.#virsh.runWithin(this.#freezeMs, "domfsfreeze");
    this.#frozenCount = countIn(await orAborted(this.#freezing, signal));
  }

  async thaw(): Promise<void> {
    const startMs = this.#startMs;
    if (startMs === undefined) return;
    await this.#freezing.catch(() => undefined);
    let failure: unknown;
    for (let i = 0; i < THAW_TRIES; i++) {
      try {
        const isHeld = countIn(await this.#virsh.run("domfsthaw")) >= this.#frozenCount;
        this.info = { frozenMs: performance.now() - startMs, fileSystemCount: this.#frozenCount, isHeld };
        this.#startMs = undefined;
        process.removeListener("exit", this.#atExit);
        return;
      } catch (error) {
        failure ??= error;
      }
    }
    throw stillFrozen(this.#virsh, failure);
  }

  readonly #atExit = (): void => this.#virsh.leaveBehind("domfsthaw");
}

/** Thaws what a run that was killed has left frozen; how many file systems that were. @throws CowcatherError as Virsh.run */
export async function thawDomain(virsh: Virsh): Promise<number> {
  return countIn(await virsh.run("domfsthaw"));
}

/** "Froze 2 filesystem(s)", "Thawed 2 filesystem(s)": tools/virsh-domain.c */
function countIn(output: string): number {
  return Number(/^(?:Froze|Thawed) (\d+)/m.exec(output)?.[1] ?? 0);
}

/** While the guest is frozen its agent takes no command but to thaw (qga/main.c, ga_freeze_allowlist). */
function asAgentsError(cause: unknown, object: string): unknown {
  if (!(cause instanceof VirshError)) return cause;
  if (/has been disabled|is not allowed/i.test(cause.complaint)) {
    return new CowcatcherError({
      code: "BUSY",
      object,
      problem: "the guest's file systems are frozen already",
      hint: `wait for the other backup, or, if there is none: virsh domfsthaw ${object}`,
      cause,
    });
  }
  if (!/guest agent/i.test(cause.complaint)) return cause;
  return new CowcatcherError({
    code: "UNSUPPORTED",
    object,
    problem: `the guest cannot be frozen: ${cause.complaint}`,
    hint: "give the domain a channel org.qemu.guest_agent.0, and the guest the agent; or leave out --freeze",
    cause,
  });
}

function stillFrozen({ domain, connect }: Virsh, cause: unknown): CowcatcherError {
  const at = connect === undefined ? "" : ` --connect ${connect}`;
  return new CowcatcherError({
    code: "IO",
    object: domain,
    problem: `the guest may still be frozen, as it could not be thawed: ${toCowcatcherError(cause, domain).problem}`,
    hint: `run: virsh${at} domfsthaw ${domain}`,
    cause,
  });
}
