// `repo key`: what opens an encrypted repository.
import { Repository } from "../../repository/repository.js";
import type { KeyInfo } from "../../repository/format/keys.js";
import { usageError } from "../options/options.js";
import { keyFromFile, passphraseFromFile } from "../../repository/key-files.js";
import { keySource, repositoryArguments } from "../options/repository-options.js";
import { alignColumns } from "../output/columns.js";
import { type CommandContext, printJsonDocument, printLine } from "../output/context.js";
import { EXIT } from "../output/exit-codes.js";
import { refuseRest, type RepoFlags, withRepository } from "./repo-common.js";

export function runKey(
  [action, ...args]: string[],
  flags: RepoFlags,
  { output }: CommandContext,
): Promise<number> {
  const { repository: address, rest } = repositoryArguments(args, flags.repo);
  const [id, ...more] = rest;
  refuseRest(more);
  return withRepository(address, flags, async (repository) => {
    switch (action) {
      case "list": {
        const shown = await shownKeys(repository);
        if (output.json) printJsonDocument(output, shown);
        else for (const line of alignColumns(shown.map(Object.values<string>))) printLine(output, line);
        return EXIT.done;
      }
      case "add":
      case "change": {
        const old = action === "change" ? await currentKey(repository, flags) : undefined;
        const added = await repository.addKey(newKey(flags));
        // The new one is stable: a kill in between leaves both.
        if (old !== undefined) await repository.removeKey(old);
        if (output.json) printJsonDocument(output, await shownKeys(repository));
        else if (!output.quiet)
          printLine(output, `${added}  ${action === "add" ? "added" : "is the key now"}`);
        return EXIT.done;
      }
      case "remove":
        if (id === undefined) throw usageError("ID", "is missing", "see repo key list");
        await repository.removeKey(id);
        if (output.json) printJsonDocument(output, await shownKeys(repository));
        return EXIT.done;
      default:
        throw usageError(action ?? "ACTION", "is none", "give list, add, remove or change");
    }
  });
}

async function shownKeys(
  repository: Repository,
): Promise<Pick<KeyInfo, "id" | "kind" | "created" | "comment">[]> {
  return (await repository.keys()).map(({ id, kind, created, comment }) => ({ id, kind, created, comment }));
}

async function currentKey(repository: Repository, flags: RepoFlags): Promise<string> {
  const source = keySource(flags);
  if (source === undefined)
    throw usageError("--key-file", "is missing", "give the key that is to be changed");
  return repository.findKey(source);
}

function newKey({ toKeyFile, toPassphraseFile }: RepoFlags): ReturnType<typeof keyFromFile> {
  if (toKeyFile !== undefined && toPassphraseFile === undefined) return keyFromFile(toKeyFile);
  if (toPassphraseFile !== undefined && toKeyFile === undefined) return passphraseFromFile(toPassphraseFile);
  throw usageError("--to-key-file", "or --to-passphrase-file is missing", "give one of them");
}
