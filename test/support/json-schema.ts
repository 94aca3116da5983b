import { Validator, type Schema } from "@cfworker/json-schema";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { expect } from "vitest";

const SCHEMAS = "docs/schema";

/** What the command printed is what docs/schema/`name`.json says. */
export function expectSchema(name: string, value: unknown): void {
  const schema = JSON.parse(readFileSync(join(SCHEMAS, `${name}.json`), "utf8")) as Schema;
  const { valid, errors } = new Validator(schema, "2020-12", false).validate(value);
  expect(valid, `${JSON.stringify(value)}\n${JSON.stringify(errors, null, 1)}`).toBe(true);
}
