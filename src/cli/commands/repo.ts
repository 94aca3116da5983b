import type { Command } from "commander";
import { CHUNK_SIZES_BYTES } from "../../repository/format/config.js";
import { RULES } from "../../repository/upkeep/retention.js";
import { formatBytes } from "../../units.js";
import type { RepoFlags } from "../actions/repo-common.js";
import { countOption, sizeOption, textOption } from "../options/options.js";
import { addKeyOptions } from "../options/repository-options.js";
import { addCommonOptions, type CommonFlags, define, type RunCommand } from "./definition.js";

/** Loaded once one of them is asked for: every command's start would pay for it else. */
const loadActions = async () => ({
  ...(await import("../actions/repo.js")),
  ...(await import("../actions/repo-forget.js")),
  ...(await import("../actions/repo-verify.js")),
  ...(await import("../actions/repo-key.js")),
});
type Actions = Awaited<ReturnType<typeof loadActions>>;
type Flags = RepoFlags & CommonFlags;

export function addRepo(program: Command, run: RunCommand): void {
  const repo = define(program, "repo", {
    summary: "a repository of backups: make it, list it, keep it in order",
    usage: "init|list|forget|protect|unprotect|prune|verify|stats|key [options] [REPO] ...",
    notes:
      "REPO is a folder, or s3:https://HOST[:PORT]/BUCKET[/PREFIX] with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and\n" +
      "AWS_REGION, or AWS_SHARED_CREDENTIALS_FILE. Where it is left out, COWCATCHER_REPO names it. A backup is\n" +
      "REPO::GROUP[@TIME]; TIME as `repo list` shows it, or its beginning, or latest.\n" +
      "prune may run beside backups, from any machine. forget frees nothing by itself: prune does.",
    examples: [
      "cowcatcher repo init /backup --key-file /root/backup.key --new-key-file",
      "cowcatcher backup disk.qcow2 --repo /backup --group vm1",
      "cowcatcher repo forget /backup::vm1 --keep-last 3 --keep-daily 14 --keep-weekly 8 --dry-run",
    ],
  });
  const add = (
    name: string,
    usage: string,
    summary: string,
    extend: (command: Command) => Command,
    body: (actions: Actions, args: string[], flags: Flags) => Parameters<RunCommand>[2],
  ): void => {
    const command = repo.command(name).summary(summary).description(summary).usage(`[options] ${usage}`);
    command.argument("[ARGUMENTS...]", usage);
    addKeyOptions(command).addOption(textOption("--repo <REPO>", "the repository (the first argument)"));
    addCommonOptions(extend(command)).action((args: string[], flags: Flags) =>
      run("repo", flags, async (context) => body(await loadActions(), args, flags)(context)),
    );
  };
  const same = (command: Command): Command => command;
  add(
    "init",
    "[REPO]",
    "make a repository",
    addInitOptions,
    (actions, args, flags) => (context) => actions.runInit(args, flags, context),
  );
  add(
    "list",
    "[REPO] [GROUP]",
    "its backups",
    same,
    (actions, args, flags) => (context) => actions.runList(args, flags, context),
  );
  add(
    "forget",
    "[REPO] GROUP, or BACKUP...",
    "end backups: those of a group that no rule keeps, or those named",
    addForgetOptions,
    (actions, args, flags) => (context) => actions.runForget(args, flags, context),
  );
  add(
    "protect",
    "BACKUP...",
    "keep backups whatever the rules say",
    same,
    (actions, args, flags) => (context) => actions.runProtect(args, true, flags, context),
  );
  add(
    "unprotect",
    "BACKUP...",
    "let the rules decide again",
    same,
    (actions, args, flags) => (context) => actions.runProtect(args, false, flags, context),
  );
  add(
    "prune",
    "[REPO]",
    "free what no backup refers to; safe beside running backups",
    (command) => command.option("--dry-run", "delete nothing"),
    (actions, args, flags) => (context) => actions.runPrune(args, flags, context),
  );
  add(
    "verify",
    "[REPO] [BACKUP...]",
    "read back what it holds, name what is damaged, and set bad chunks aside",
    addVerifyOptions,
    (actions, args, flags) => (context) => actions.runVerify(args, flags, context),
  );
  add(
    "stats",
    "[REPO]",
    "how much it holds",
    same,
    (actions, args, flags) => (context) => actions.runStats(args, flags, context),
  );
  add(
    "key",
    "list|add|remove|change [REPO] [ID]",
    "the keys of an encrypted repository",
    (command) =>
      command
        .addOption(textOption("--to-key-file <FILE>", "for add and change: the new key's file"))
        .addOption(
          textOption("--to-passphrase-file <FILE>", "for add and change: file with the new passphrase"),
        ),
    (actions, args, flags) => (context) => actions.runKey(args, flags, context),
  );
}

function addInitOptions(command: Command): Command {
  const sizes = CHUNK_SIZES_BYTES.map((bytes) => formatBytes(bytes)).join(", ");
  return command
    .addOption(sizeOption("--chunk-size <SIZE>", `${sizes} (4M)`))
    .addOption(textOption("--compression <METHOD>", "none, zstd or zstd:LEVEL (zstd:1)"))
    .option("--new-key-file", "make the file of --key-file, which must not exist")
    .option("--no-encryption", "although the environment names a key");
}

function addForgetOptions(command: Command): Command {
  for (const rule of RULES) {
    const what = rule === "last" ? "the last N" : `one each for the last N ${PERIODS[rule]} that have one`;
    command.addOption(countOption(`--keep-${rule} <N>`, what, { min: 0, max: 1_000_000 }));
  }
  return command.option("--dry-run", "only say what would be kept and why");
}

const PERIODS = { hourly: "hours", daily: "days", weekly: "weeks", monthly: "months", yearly: "years" };

function addVerifyOptions(command: Command): Command {
  return command.addOption(
    textOption("--sample <PERCENT>", "read only so many of the chunks, others each time, such as 5%"),
  );
}
