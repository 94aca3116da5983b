import { readFileSync } from "node:fs";

// From dist/src/cli to the package's root.
const PACKAGE_JSON = new URL("../../../package.json", import.meta.url);

/** The package's version; "unknown" where package.json is not beside the program. */
export function packageVersion(): string {
  try {
    const parsed: unknown = JSON.parse(readFileSync(PACKAGE_JSON, "utf8"));
    if (typeof parsed === "object" && parsed !== null && "version" in parsed) return String(parsed.version);
  } catch {
    // A program that cannot name its version still works.
  }
  return "unknown";
}
