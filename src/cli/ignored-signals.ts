// Signals that whoever started the program has told it to ignore: SIGHUP by nohup, SIGINT by a shell that starts a job
// in the background without job control, any of them by trap '' or a supervisor. Other programs inherit that; Node sets
// it back to the default as it starts. So bin/cowcatcher looks before Node does, and hands over what it saw.
//
// Between Node's start and `keepIgnored` such a signal still ends the process, before it has touched anything.

const VARIABLE = "COWCATCHER_IGNORED_SIGNALS";

const SIGNAL_OF = new Map([
  ["HUP", "SIGHUP"],
  ["INT", "SIGINT"],
  ["TERM", "SIGTERM"],
] as const);

const ignored = new Set<NodeJS.Signals>();

/**
 * From now on those signals do nothing. The variable is taken out of `environment`: it tells of this process, and not
 * of the commands that this one starts. Main thread only; once.
 */
export function keepIgnored(environment: NodeJS.ProcessEnv): void {
  for (const [name, signal] of SIGNAL_OF) {
    if (environment[VARIABLE]?.split(",").includes(name) !== true) continue;
    ignored.add(signal);
    // With no listener Node gives the signal its default, which is to end the process.
    process.on(signal, () => undefined);
  }
  Reflect.deleteProperty(environment, VARIABLE);
}

/** Whether the signal is to ask for nothing. */
export function isIgnored(signal: NodeJS.Signals): boolean {
  return ignored.has(signal);
}
