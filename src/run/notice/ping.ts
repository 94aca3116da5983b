// Pings: an address that is asked at a job's start and end, as healthchecks.io, Uptime Kuma and others want it. The result
// goes with it as JSON, and ?rid= ties an end to its start. A monitor that does not answer is told of, and changes nothing.
import { setTimeout as delay } from "node:timers/promises";
import { messageOf } from "../../errors.js";

const TIMEOUT_MS = 10_000;
const TRIES = 3;
const RETRY_MS = 1_000;
/** What healthchecks.io keeps. */
const MAX_BODY_BYTES = 100_000;

/**
 * Undefined when it has been answered with success; else what is wrong, with the address's host alone: the rest of it is
 * a secret.
 */
export async function ping(address: string, runId: string, document: unknown): Promise<string | undefined> {
  const url = new URL(address);
  if (!url.searchParams.has("rid")) url.searchParams.set("rid", runId);
  const body = document === undefined ? "" : JSON.stringify(document).slice(0, MAX_BODY_BYTES);
  let problem = "";
  for (let attempt = 1; attempt <= TRIES; attempt++) {
    if (attempt > 1) await delay(RETRY_MS * (attempt - 1));
    try {
      const answer = await fetch(url, {
        method: "POST",
        body,
        headers: { "content-type": "application/json" },
        signal: AbortSignal.timeout(TIMEOUT_MS),
      });
      await answer.body?.cancel();
      if (answer.ok) return undefined;
      problem = `answered ${answer.status}`;
      // Asked wrongly, it is asked wrongly again.
      if (answer.status < 500 && answer.status !== 429) break;
    } catch (error) {
      problem = causeOf(error);
    }
  }
  return `the ping to ${url.host} failed: ${problem}`;
}

/** fetch says "fetch failed", and why in its cause. */
function causeOf(error: unknown): string {
  const cause = error instanceof Error ? error.cause : undefined;
  return messageOf(cause ?? error);
}
