// The cowcatcher command as a user runs it: the built one, in processes of its own.

import { fileURLToPath } from "node:url";
import type { SpawnOptions } from "node:child_process";
import { Child, waitForChild } from "./children.js";

/** The built command; COWCATCHER_BIN names another. */
export const COWCATCHER_BIN =
  process.env["COWCATCHER_BIN"] ?? fileURLToPath(new URL("../../src/cli/main.cjs", import.meta.url));

export function startCowcatcher(args: readonly string[], options: SpawnOptions = {}): Child {
  return new Child(`cowcatcher ${args[0]}`, process.execPath, [COWCATCHER_BIN, ...args], options);
}

export interface ServeOptions {
  image: string;
  format: "raw" | "qcow2";
  socket: string;
  control: string;
  /** Added to the environment. */
  env?: Record<string, string> | undefined;
  /** Further arguments. */
  args?: readonly string[] | undefined;
}

/** Starts `serve`; resolves when it listens. @throws CowcatcherError IO if it does not. */
export async function startServe({
  image,
  format,
  socket,
  control,
  env,
  args: more = [],
}: ServeOptions): Promise<Child> {
  const args = ["serve", image, "-f", format, "--socket", socket, "--control", control, ...more];
  const child = startCowcatcher(args, { env: { ...process.env, ...env } });
  await waitForChild(child, "line with 'listening'", () => /listening/.test(child.stdout) || undefined);
  return child;
}
