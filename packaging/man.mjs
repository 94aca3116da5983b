// Manual pages from commander's tree: cowcatcher(1), one for each command, and cowcatcher-jobs(5) from the job file's shapes.
// In the macros of man(7), which mandoc and groff read alike; `mandoc -T lint` is clean of them (test/unit/packaging).
import { jobMembers, readCommands, version } from "./command-tree.mjs";

const DESCRIPTION = "point-in-time backups of virtual-machine disks that the running guest hardly notices";
/** Of the pages; not the build's, so that two builds are the same. SOURCE_DATE_EPOCH is what reproducible builds set. */
const DATE = new Date(Number(process.env.SOURCE_DATE_EPOCH ?? 1_795_824_000) * 1000)
  .toISOString()
  .slice(0, 10);

/** By file name. @returns {Map<string, string>} */
export async function manualPages() {
  const commands = await readCommands();
  const pages = new Map([["cowcatcher.1", overview(commands)]]);
  for (const command of commands) pages.set(`cowcatcher-${command.name}.1`, commandPage(command, commands));
  pages.set("cowcatcher-jobs.5", jobsPage());
  return pages;
}

function overview(commands) {
  return page("cowcatcher", "1", DESCRIPTION, [
    section("SYNOPSIS"),
    bold("cowcatcher"),
    `${italic("COMMAND")} [${italic("OPTIONS")}] ...`,
    section("DESCRIPTION"),
    text(
      "cowcatcher copies the disks of virtual machines, raw or qcow2, as they were at one instant, while the machine " +
        "goes on writing. Each command has a page of its own.",
    ),
    section("COMMANDS"),
    ...commands.flatMap(({ name, summary }) => [
      ".TP",
      `\\fBcowcatcher\\-${escape(name)}\\fR(1)`,
      text(summary),
    ]),
    section("SEE ALSO"),
    ...seeAlso([
      ...commands.map(({ name }) => [`cowcatcher-${name}`, "1"]),
      ["cowcatcher-jobs", "5"],
      ["qemu-img", "1"],
    ]),
  ]);
}

function commandPage({ name, summary, usages, options, notes, commands: parts }, commands) {
  const [exitCodes, rest] = takeBlock(notes, "Exit codes:");
  const [examples, remarks] = takeBlock(rest, "Examples:");
  const others = commands
    .filter((other) => other.name !== name)
    .map((other) => [`cowcatcher-${other.name}`, "1"]);
  return page(`cowcatcher-${name}`, "1", summary, [
    section("SYNOPSIS"),
    ...usages.flatMap((usage, index) => [...(index === 0 ? [] : [".br"]), text(usage)]),
    section("DESCRIPTION"),
    text(sentence(summary)),
    ...paragraphs(remarks).flatMap((paragraph) => [".PP", text(paragraph)]),
    ...parts.flatMap((part) => [
      `.SS "${escape(part.name)}"`,
      text(sentence(part.summary)),
      ...part.usages.flatMap((usage) => [".PP", text(usage)]),
      ...optionList(part.options),
    ]),
    section("OPTIONS"),
    ...optionList(options),
    section("EXIT STATUS"),
    ...exitCodes.flatMap((line) => {
      const [, code = "", meaning = ""] = /^(\d+)\s+(.*)$/.exec(line) ?? [];
      return [".TP", bold(code), text(meaning)];
    }),
    section("EXAMPLES"),
    ".EX",
    ...examples.map(literal),
    ".EE",
    section("SEE ALSO"),
    ...seeAlso([["cowcatcher", "1"], ...others, ...(name === "run" ? [["cowcatcher-jobs", "5"]] : [])]),
  ]);
}

function jobsPage() {
  const keys = (members) =>
    Object.entries(members).flatMap(([key, { schema }]) => {
      const { description, kind } = describe(schema);
      return [".TP", `\\fB${escape(key)}\\fR: ${escape(kind)}`, text(sentence(description))];
    });
  return page("cowcatcher-jobs", "5", "job files of cowcatcher run", [
    section("SYNOPSIS"),
    ".I /etc/cowcatcher/jobs.d/*.yaml",
    section("DESCRIPTION"),
    text(
      "YAML files with two keys: defaults, which the jobs of the file inherit (those of a file defaults.yaml are inherited " +
        "by all), and jobs, by their names. They must belong to the user or to root, and others may not write them.",
    ),
    section("KEYS OF A JOB"),
    ...keys(jobMembers),
    section("EXAMPLES"),
    ".EX",
    ...[
      "defaults:",
      "  target: /backup/{group}/{disk}-{date}.qcow2",
      "  require-mount: /backup",
      "  keep: {last: 3, daily: 7, weekly: 4}",
      "jobs:",
      "  web:",
      "    control: /run/cowcatcher/web.control",
    ].map(literal),
    ".EE",
    section("SEE ALSO"),
    ...seeAlso([
      ["cowcatcher-run", "1"],
      ["cowcatcher-backup", "1"],
      ["cowcatcher-repo", "1"],
    ]),
  ]);
}

/** A key's own words, and what kind of value it has. */
function describe(schema) {
  const first = schema.anyOf?.[0] ?? schema;
  const description = schema.description ?? first.description ?? "";
  if (schema.enum !== undefined) return { description, kind: schema.enum.join(", ") };
  const kinds = (schema.anyOf ?? [schema]).map(({ type }) => [type].flat().join(" or "));
  const names =
    first.type === "object" && first.properties !== undefined ? Object.keys(first.properties) : [];
  const more = names.length === 0 ? "" : ` of ${names.join(", ")}`;
  return { description, kind: [...new Set(kinds)].join(" or ") + more };
}

function page(name, part, summary, lines) {
  const head = `.TH "${escape(name.toUpperCase())}" "${part}" "${DATE}" "cowcatcher ${version}" "cowcatcher"`;
  return [head, section("NAME"), nameLine(name, summary), ...lines, ""].join("\n");
}

/** Its form is what whatis(1) looks for. */
function nameLine(name, summary) {
  return text(`${name} DASH ${summary}`).replace("DASH", "\\-");
}

const section = (title) => `.SH "${title}"`;
const bold = (word) => `.B "${escape(word).replaceAll('"', "\\(dq")}"`;
const italic = (word) => `\\fI${word}\\fR`;

function optionList(options) {
  return options.flatMap(({ flags, help }) => [".TP", `\\fB${escape(flags)}\\fR`, text(help)]);
}

function seeAlso(pages) {
  return pages.map(
    ([name, part], index) => `.BR ${escape(name)} (${part})${index === pages.length - 1 ? "" : " ,"}`,
  );
}

/** Wrapped, so that no line is longer than a reader of the source likes; none begins as a request would. */
function text(words) {
  const lines = [""];
  for (const word of escape(words).split(/\s+/)) {
    const line = lines.at(-1);
    if (line !== "" && line.length + word.length + 1 > 78) lines.push(word);
    else lines[lines.length - 1] = line === "" ? word : `${line} ${word}`;
  }
  return lines.map((line) => (/^[.']/.test(line) ? `\\&${line}` : line)).join("\n");
}

function literal(line) {
  const escaped = escape(line);
  return /^[.']/.test(escaped) ? `\\&${escaped}` : escaped;
}

/** Of roff: a backslash begins a request, a hyphen would be a dash, and what is not ASCII has names. */
function escape(words) {
  return words
    .replaceAll("\\", "\\e")
    .replaceAll("-", "\\-")
    .replaceAll("…", "...")
    .replace(
      /[^\x00-\x7f]/gu,
      (letter) => `\\[u${letter.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}]`,
    );
}

const sentence = (words) => `${words.charAt(0).toUpperCase()}${words.slice(1).replace(/\.$/, "")}.`;

function paragraphs(notes) {
  return notes.split(/\n\s*\n/).filter((paragraph) => paragraph.trim() !== "");
}

/** The indented lines behind a heading, and the text without them. */
function takeBlock(notes, heading) {
  const lines = notes.split("\n");
  const from = lines.indexOf(heading);
  if (from < 0) return [[], notes];
  let to = from + 1;
  while (to < lines.length && lines[to].startsWith("  ")) to++;
  const block = lines.slice(from + 1, to).map((line) => line.trim());
  return [block, [...lines.slice(0, from), ...lines.slice(to)].join("\n")];
}
