// Completions for bash, zsh and fish, from commander's tree: commands, the parts of `repo`, options. Their values and all
// arguments are completed as files, but for the names of jobs, which `cowcatcher run --check --json` tells.
// Static: completing starts no program, but for jobs.
import { readCommands } from "./command-tree.mjs";

const SUBCOMMANDS = { jobs: ["cancel", "pause", "resume", "set-speed"], checkpoints: ["delete"] };
const JOB_NAMES =
  `cowcatcher run --check --json 2>/dev/null | ` +
  `sed -n '/"jobs": \\[/,/\\]/s/^ *"\\([A-Za-z0-9._+-]*\\)",\\{0,1\\}$/\\1/p'`;

/** @returns {Map<string, string>} by the file's name */
export async function completions() {
  const commands = await readCommands();
  return new Map([
    ["cowcatcher.bash", bash(commands)],
    ["_cowcatcher", zsh(commands)],
    ["cowcatcher.fish", fish(commands)],
  ]);
}

const partsOf = ({ name, commands }) => [...commands.map((part) => part.name), ...(SUBCOMMANDS[name] ?? [])];
const longs = ({ options }) => options.flatMap(({ long }) => long ?? []);
/** Options whose next word is a value. */
const valued = ({ options }) =>
  options
    .filter(({ value, isOptional }) => value !== undefined && !isOptional)
    .flatMap(({ short, long }) => [short, long].filter(Boolean));

function bash(commands) {
  const cases = commands.map((command) => {
    const all = [...new Set([...longs(command), ...command.commands.flatMap(longs)])];
    const values = [...new Set([...valued(command), ...command.commands.flatMap(valued)])];
    return `    ${command.name})
      parts="${partsOf(command).join(" ")}"
      options="${all.join(" ")}"
      valued=" ${values.join(" ")} "
      ;;`;
  });
  return `# bash completion of cowcatcher
_cowcatcher() {
  local word=\${COMP_WORDS[COMP_CWORD]} previous=\${COMP_WORDS[COMP_CWORD - 1]} command=\${COMP_WORDS[1]-}
  local parts="" options="" valued=""
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "${commands.map(({ name }) => name).join(" ")} --help --version" -- "$word"))
    return
  fi
  case $command in
${cases.join("\n")}
    *) return ;;
  esac
  # The default, which the shell takes where nothing is offered, is files.
  if [[ $valued == *" $previous "* ]]; then return; fi
  if [[ $word == -* ]]; then
    COMPREPLY=($(compgen -W "$options" -- "$word"))
  elif [ "$command" = run ]; then
    COMPREPLY=($(compgen -W "$(${JOB_NAMES})" -- "$word"))
  elif [ "$COMP_CWORD" -eq 2 ] && [ -n "$parts" ]; then
    COMPREPLY=($(compgen -W "$parts" -- "$word"))
  fi
}
complete -o default -F _cowcatcher cowcatcher
`;
}

function zsh(commands) {
  const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const plain = (text) => text.replace(/[[\]:\\]/g, "\\$&");
  const specs = (options) =>
    options.flatMap(({ short, long, value, isOptional, help }) =>
      [short, long].filter(Boolean).map((flag) => {
        const argument = value === undefined ? "" : `${isOptional ? "::" : ":"}${plain(value)}:_files`;
        // Several times: --disk and its like are lists.
        return quote(
          `*${flag}${value !== undefined && flag.startsWith("--") ? "=" : ""}[${plain(help)}]${argument}`,
        );
      }),
    );
  const cases = commands.map((command) => {
    const parts = partsOf(command);
    const options = command.commands.length === 0 ? command.options : mergeOptions(command.commands);
    const first = parts.length === 0 ? [] : [quote(`1:part:(${parts.join(" ")})`)];
    const rest = command.name === "run" ? quote("*:job:_cowcatcher_jobs") : quote("*:file:_files");
    return `        ${command.name})\n          _arguments -s ${[...specs(options), ...first, rest].join(" \\\n            ")}\n          ;;`;
  });
  return `#compdef cowcatcher
# zsh completion of cowcatcher
_cowcatcher_jobs() {
  local -a names
  names=(\${(f)"$(${JOB_NAMES})"})
  compadd -a names
}
_cowcatcher() {
  local state line
  _arguments -C '1:command:->command' '*::argument:->argument'
  case $state in
    command)
      local -a commands
      commands=(
${commands.map(({ name, summary }) => `        ${quote(`${name}:${plain(summary)}`)}`).join("\n")}
      )
      _describe command commands
      ;;
    argument)
      case $line[1] in
${cases.join("\n")}
      esac
      ;;
  esac
}
if [ "$funcstack[1]" = _cowcatcher ]; then _cowcatcher "$@"; else compdef _cowcatcher cowcatcher; fi
`;
}

function mergeOptions(commands) {
  const byFlags = new Map(commands.flatMap(({ options }) => options.map((option) => [option.flags, option])));
  return [...byFlags.values()];
}

function fish(commands) {
  const quote = (text) => `'${text.replaceAll("\\", "\\\\").replaceAll("'", "\\'")}'`;
  const lines = ["# fish completion of cowcatcher", "complete -c cowcatcher -n __fish_use_subcommand -f"];
  for (const command of commands) {
    lines.push(
      `complete -c cowcatcher -n __fish_use_subcommand -a ${command.name} -d ${quote(command.summary)}`,
    );
    const isSeen = `'__fish_seen_subcommand_from ${command.name}'`;
    const parts = partsOf(command);
    if (parts.length > 0) {
      const isFirst = `'__fish_seen_subcommand_from ${command.name}; and not __fish_seen_subcommand_from ${parts.join(" ")}'`;
      lines.push(`complete -c cowcatcher -n ${isFirst} -a ${quote(parts.join(" "))}`);
    }
    if (command.name === "run")
      lines.push(`complete -c cowcatcher -n ${isSeen} -f -a ${quote(`(${JOB_NAMES})`)}`);
    for (const { short, long, value, isOptional, help } of mergeOptions([command, ...command.commands])) {
      const names = [
        ...(short === undefined ? [] : [`-s ${short.slice(1)}`]),
        ...(long === undefined ? [] : [`-l ${long.slice(2)}`]),
      ];
      const takes = value !== undefined && !isOptional ? " -r" : "";
      lines.push(`complete -c cowcatcher -n ${isSeen} ${names.join(" ")}${takes} -d ${quote(help)}`);
    }
  }
  return `${lines.join("\n")}\n`;
}
