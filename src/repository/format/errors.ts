// The errors of a repository's room, in the words of the user.

import { CowcatcherError } from "../../errors.js";

/** An object that is not what it was when it was written. */
export function damagedError(storeName: string, objectName: string, problem: string): CowcatcherError {
  return new CowcatcherError({
    code: "FORMAT",
    object: storeName,
    problem: `the object ${objectName} is damaged: ${problem}`,
    hint: "run repo verify to see which backups it harms",
  });
}

/** Exit code 11. */
export function keyError(storeName: string, problem: string, hint: string): CowcatcherError {
  return new CowcatcherError({ code: "KEY", object: storeName, problem, hint });
}
