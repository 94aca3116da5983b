// Colours: on a terminal alone, and not where the user has said NO_COLOR (https://no-color.org: set and not empty) or the
// terminal cannot.
import type { Environment, TextOutput } from "./context.js";

/** SGR parameters (ECMA-48, 8.3.117). */
const CODES = { red: 31, green: 32, yellow: 33, cyan: 36 } as const;
export type Colour = keyof typeof CODES;

export function hasColours({ isTTY }: TextOutput, environment: Environment): boolean {
  return isTTY === true && (environment["NO_COLOR"] ?? "") === "" && environment["TERM"] !== "dumb";
}

/** @param isOn as hasColours says of where the text goes */
export function coloured(text: string, colour: Colour, isOn: boolean): string {
  return isOn && text !== "" ? `\u001b[${CODES[colour]}m${text}\u001b[0m` : text;
}
