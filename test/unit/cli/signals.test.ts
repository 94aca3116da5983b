// SIGINT and SIGTERM: in good order first, at once then.
import { afterEach, describe, expect, it } from "vitest";
import type { CommandContext } from "../../../src/cli/output/context.js";
import { onInterrupt } from "../../../src/cli/signals.js";

function makeContext(): { context: Pick<CommandContext, "interruptedBy" | "logger">; logged: unknown[] } {
  const logged: unknown[] = [];
  const logger = { error: (details: unknown) => logged.push(details) } as unknown as CommandContext["logger"];
  return { context: { interruptedBy: undefined, logger }, logged };
}

const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));

let remove: (() => void) | undefined;
afterEach(() => {
  remove?.();
  expect(process.listenerCount("SIGINT")).toBe(0);
  expect(process.listenerCount("SIGTERM")).toBe(0);
});

describe("onInterrupt", () => {
  it("calls the handler at the first signal, and ends the process at the second", async () => {
    const { context } = makeContext();
    const events: string[] = [];
    remove = onInterrupt(
      context,
      {
        onFirst: (signal) => {
          events.push(`first ${signal}`);
          return new Promise(() => undefined);
        },
        onSecond: (signal) => events.push(`second ${signal}`),
      },
      { exit: (code) => events.push(`exit ${code}`) },
    );
    process.emit("SIGTERM", "SIGTERM");
    expect(context.interruptedBy).toBe("SIGTERM");
    await turn();
    process.emit("SIGINT", "SIGINT");
    expect(events).toEqual(["first SIGTERM", "second SIGINT", "exit 130"]);
    // The signal that began it names the cause.
    expect(context.interruptedBy).toBe("SIGTERM");
  });

  it.each([
    ["SIGINT", 130],
    ["SIGTERM", 143],
  ] as const)("ends the process if the handler of %s fails", async (signal, code) => {
    const { context, logged } = makeContext();
    const exits: number[] = [];
    remove = onInterrupt(
      context,
      {
        onFirst: () => {
          throw new Error("cannot");
        },
      },
      { exit: (exitCode) => exits.push(exitCode) },
    );
    process.emit(signal, signal);
    await turn();
    expect(exits).toEqual([code]);
    expect(logged).toHaveLength(1);
  });
});
