// The folders of the packages that cowcatcher runs with, one a line: those of package-lock.json that are not for development
// alone, and that are installed (the native ones are there for one platform each).
import { existsSync, readFileSync } from "node:fs";

const { packages } = JSON.parse(readFileSync("package-lock.json", "utf8"));
for (const [folder, { dev, devOptional, peer }] of Object.entries(packages)) {
  if (folder === "" || dev || devOptional || peer || !existsSync(folder)) continue;
  process.stdout.write(`${folder}\n`);
}
