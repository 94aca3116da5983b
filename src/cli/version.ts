import { readFileSync } from "node:fs";

// The package's root, seen from dist/src/cli and, when tests load the sources, from src/cli.
const CANDIDATES = ["../../../package.json", "../../package.json"];

/** The package's version; "unknown" where package.json is not beside the program. */
export function packageVersion(): string {
  for (const candidate of CANDIDATES) {
    const version = versionIn(new URL(candidate, import.meta.url));
    if (version !== undefined) return version;
  }
  return "unknown";
}

function versionIn(file: URL): string | undefined {
  try {
    const parsed: unknown = JSON.parse(readFileSync(file, "utf8"));
    if (typeof parsed !== "object" || parsed === null || !("name" in parsed && "version" in parsed))
      return undefined;
    return parsed.name === "cowcatcher" ? String(parsed.version) : undefined;
  } catch {
    // A program that cannot name its version still works.
    return undefined;
  }
}
