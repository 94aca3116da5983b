// T0 while the guest's file systems hold still. Who can make them hold still is a matter of the caller (qemu/guest-freeze.ts).

import { CowcatcherError, toCowcatcherError } from "../../errors.js";

/** What became of a freeze. */
export interface FreezeInfo {
  /** From the request to freeze to the answer that all is thawed, in ms. */
  frozenMs: number;
  fileSystemCount: number;
  /** They were frozen until we thawed them. False: some were not, so T0 may have met a guest that wrote. */
  isHeld: boolean;
}

export interface GuestFreezer {
  /** Before anything is prepared. @throws CowcatcherError why it cannot be done */
  check(): Promise<void>;
  /** Ends early, by its reason, when `signal` is aborted. @throws CowcatcherError: thaw is to follow all the same */
  freeze(signal?: AbortSignal): Promise<void>;
  /** Does nothing where no freeze was asked for. @throws CowcatcherError: the guest may be frozen */
  thaw(): Promise<void>;
  /** After thaw. */
  readonly info: FreezeInfo | undefined;
}

/**
 * Runs `step` in a frozen guest, which is thawed whatever comes of it; without a freezer just runs it.
 * @throws CowcatcherError what failed first, and if the guest could not be thawed that, too
 */
export async function whileFrozen<T>(
  freezer: GuestFreezer | undefined,
  step: () => Promise<T>,
  signal?: AbortSignal,
): Promise<T> {
  if (freezer === undefined) return step();
  let result: T;
  try {
    await freezer.freeze(signal);
    result = await step();
  } catch (error) {
    await freezer.thaw().catch((notThawed: unknown) => {
      throw bothFailed(toCowcatcherError(error), toCowcatcherError(notThawed));
    });
    throw error;
  }
  await freezer.thaw();
  return result;
}

function bothFailed(first: CowcatcherError, notThawed: CowcatcherError): CowcatcherError {
  const { object, problem, hint } = notThawed;
  return new CowcatcherError({
    ...first.toDetails(),
    problem: `${first.problem}; ${object}: ${problem}`,
    hint,
  });
}
