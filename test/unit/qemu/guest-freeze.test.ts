// The guest is frozen for T0 and thawed whatever happens: against an agent that does what the test says.
import { afterEach, describe, expect, it } from "vitest";
import { whileFrozen } from "../../../src/backup/job/while-frozen.js";
import { CowcatcherError } from "../../../src/errors.js";
import { GuestFreeze, thawGuest, type FreezeLimits } from "../../../src/qemu/guest-freeze.js";
import { type AgentScript, guestWith, ScriptedAgent } from "../../support/guest-agent.js";
import { until } from "../../support/server.js";

const FREEZE = "guest-fsfreeze-freeze";
const THAW = "guest-fsfreeze-thaw";
const STATUS = "guest-fsfreeze-status";
const never = (): Promise<never> => new Promise(() => undefined);

describe("GuestFreeze", () => {
  const agents: ScriptedAgent[] = [];
  afterEach(() => {
    for (const agent of agents.splice(0)) agent.close();
  });

  async function start(script: AgentScript): Promise<ScriptedAgent> {
    const agent = await new ScriptedAgent(script).listen();
    agents.push(agent);
    return agent;
  }

  async function errorOf(work: Promise<unknown>): Promise<CowcatcherError> {
    return work.then(
      () => expect.fail("it worked"),
      (error: unknown) => error as CowcatcherError,
    );
  }

  function freezer({ path }: ScriptedAgent, limits: Partial<FreezeLimits> = {}): GuestFreeze {
    return new GuestFreeze(path, limits);
  }

  it("freezes, takes the step, and thaws, over what an earlier client has left in the channel", async () => {
    const agent = await start(guestWith(3));
    agent.stale = '{"return": 7}\n{"return": "fro';
    const freeze = freezer(agent);
    await freeze.check();
    const result = await whileFrozen(freeze, () => Promise.resolve([...agent.done]));
    expect(result).toEqual([STATUS, STATUS, FREEZE]);
    expect(agent.done).toEqual([STATUS, STATUS, FREEZE, THAW]);
    expect(freeze.info).toMatchObject({ fileSystemCount: 3, isHeld: true });
    expect(freeze.info?.frozenMs).toBeGreaterThan(0);
  });

  it("thaws when the step fails, whose error is the one that is shown", async () => {
    const agent = await start(guestWith(1));
    const failure = new CowcatcherError({ code: "IO", object: "disk", problem: "is gone" });
    const error = await errorOf(whileFrozen(freezer(agent), () => Promise.reject(failure)));
    expect(error).toBe(failure);
    expect(agent.done).toEqual([STATUS, FREEZE, THAW]);
  });

  it("thaws when the agent refuses to freeze, in whose words it fails, and takes no step", async () => {
    const agent = await start((command) => {
      if (command === FREEZE) throw new Error("failed to freeze /: Device or resource busy");
      return command === STATUS ? "thawed" : 0;
    });
    const error = await errorOf(whileFrozen(freezer(agent), () => expect.fail("a step was taken")));
    expect(error.problem).toContain(
      "refuses guest-fsfreeze-freeze: failed to freeze /: Device or resource busy",
    );
    expect(agent.done).toEqual([STATUS, FREEZE, THAW]);
  });

  it("has the thaw in the agent's queue when a freeze was not answered in time", async () => {
    let answerFreeze: (count: number) => void = () => undefined;
    const agent = await start((command) => {
      if (command === FREEZE) return new Promise((resolve) => (answerFreeze = resolve));
      return command === STATUS ? "thawed" : 2;
    });
    const work = whileFrozen(freezer(agent, { freezeMs: 20 }), () => expect.fail("a step was taken"));
    const failed = errorOf(work);
    // The thaw comes over the same connection, behind the freeze, which is carried out at last.
    await until("the freeze is given up", () => agent.asked.includes(THAW));
    answerFreeze(2);
    const error = await failed;
    expect(error).toMatchObject({ errno: "ETIMEDOUT", object: agent.path });
    expect(error.problem).toContain("not an answer to guest-fsfreeze-freeze within 0.02 s");
    expect(agent.done).toEqual([STATUS, FREEZE, THAW]);
  });

  it("thaws when it is given up while the guest freezes", async () => {
    let answerFreeze: (count: number) => void = () => undefined;
    const agent = await start((command) => {
      if (command === FREEZE) return new Promise((resolve) => (answerFreeze = resolve));
      return command === STATUS ? "thawed" : 2;
    });
    const abort = new AbortController();
    const work = whileFrozen(freezer(agent), () => expect.fail("a step was taken"), abort.signal);
    const failed = errorOf(work);
    await until("the freeze is under way", () => agent.done.includes(FREEZE));
    const reason = new CowcatcherError({ code: "CANCELLED", object: "backup", problem: "given up" });
    abort.abort(reason);
    await until("the thaw is sent", () => agent.asked.includes(THAW));
    answerFreeze(2);
    expect(await failed).toBe(reason);
    expect(agent.done).toEqual([STATUS, FREEZE, THAW]);
  });

  it("leaves a guest alone that somebody else has frozen", async () => {
    const agent = await start(() => "frozen");
    const error = await errorOf(whileFrozen(freezer(agent), () => expect.fail("a step was taken")));
    expect(error).toMatchObject({ code: "BUSY" });
    expect(error.hint).toContain("--cleanup --freeze");
    expect(agent.done).toEqual([STATUS]);
  });

  it("sends no freeze to an agent that does not answer, as it would freeze when nobody is there to thaw", async () => {
    const agent = await start((command) => (command === STATUS ? "thawed" : never()));
    const freeze = freezer(agent);
    const abort = new AbortController();
    const failed = errorOf(whileFrozen(freeze, () => expect.fail("a step was taken"), abort.signal));
    await until("the agent is asked", () => (agent.clients[0]?.bytesRead ?? 0) > 0);
    agent.clients[0]?.destroy();
    expect(await failed).toMatchObject({ code: "IO" });
    expect(agent.done).toEqual([]);
  });

  it("thaws over a new connection when the first is lost", async () => {
    const agent = await start(guestWith(2));
    const freeze = freezer(agent);
    await whileFrozen(freeze, async () => {
      agent.clients[0]?.destroy();
      await until("it is lost", () => agent.clients[0]?.closed === true);
    });
    expect(agent.done).toEqual([STATUS, FREEZE, THAW]);
    expect(agent.clients).toHaveLength(2);
    expect(freeze.info?.isHeld).toBe(true);
  });

  it("says that the guest may be frozen when it cannot be thawed, and what to do", async () => {
    const agent = await start((command) => {
      if (command === THAW) throw new Error("no");
      return command === STATUS ? "thawed" : 1;
    });
    const error = await errorOf(whileFrozen(freezer(agent), () => Promise.resolve()));
    expect(error.problem).toContain("the guest may still be frozen");
    expect(error.hint).toContain(`--cleanup --freeze ${agent.path}`);
    expect(agent.done.filter((command) => command === THAW)).toHaveLength(3);
    const failure = new CowcatcherError({ code: "IO", object: "disk", problem: "is gone" });
    const both = await errorOf(whileFrozen(freezer(agent), () => Promise.reject(failure)));
    expect(both.message).toMatch(/disk: is gone; .*may still be frozen/);
  });

  it("tells of a guest that thawed before it was told to", async () => {
    const agent = await start((command) => (command === STATUS ? "thawed" : command === FREEZE ? 3 : 0));
    const freeze = freezer(agent);
    await whileFrozen(freeze, () => Promise.resolve());
    expect(freeze.info).toMatchObject({ fileSystemCount: 3, isHeld: false });
  });

  it("sends the thaw when the process ends while the guest is frozen", async () => {
    const agent = await start(guestWith(1));
    const before = process.listeners("exit");
    await whileFrozen(freezer(agent), async () => {
      const [atExit, ...others] = process.listeners("exit").filter((listener) => !before.includes(listener));
      expect(others).toEqual([]);
      atExit?.(0);
      await until("the guest is thawed", () => agent.done.includes(THAW));
    });
    expect(process.listeners("exit")).toEqual(before);
  });

  it("thaws what a run that was killed has left", async () => {
    const agent = await start(guestWith(4));
    await agent.script(FREEZE);
    expect(await thawGuest(agent.path)).toBe(4);
    expect(await thawGuest(agent.path)).toBe(0);
  });

  it("names what is missing where nobody listens", async () => {
    const error = await errorOf(new GuestFreeze("/nowhere/qga.sock").check());
    expect(error).toMatchObject({ code: "NOT_FOUND", object: "/nowhere/qga.sock" });
    expect(error.hint).toContain("org.qemu.guest_agent.0");
  });
});
