// Some tests have a matrix of which CI takes a part and `npm run test:long` all (vitest.long.config.ts).

/** Whether this is the long run. */
export const IS_CAMPAIGN = process.env["COWCATCHER_CAMPAIGN"] === "1";

/** In CI every `each`-th case, beginning with the first; all of them in the long run. */
export function sampled<Case>(cases: readonly Case[], each: number): Case[] {
  return cases.filter((_, index) => IS_CAMPAIGN || index % each === 0);
}
