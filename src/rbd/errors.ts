// Ceph's answers as errors of the project. librados and librbd answer with -errno of Linux; what each means is a matter of
// the call, so that the one line says what is wrong in Ceph's own terms and what to do.

import { errnoName } from "../errno.js";
import { CowcatcherError, ioError } from "../errors.js";

/** The client was put on the cluster's blocklist, as by another one that took the image's lock from it. */
const BLOCKLISTED = "ESHUTDOWN";

interface Meaning {
  problem: string;
  hint?: string;
}

/** Of reads and writes, and of whatever else speaks to OSDs. */
const MEANINGS: Record<string, Meaning> = {
  ETIMEDOUT: {
    problem: "Ceph did not answer in time",
    hint: "see `ceph -s`; rados_osd_op_timeout=SECONDS in the address waits longer",
  },
  [BLOCKLISTED]: {
    problem: "Ceph has shut this client out (blocklisted)",
    hint: "another client has taken the image over, or an administrator did it",
  },
  EDQUOT: { problem: "the pool's quota is used up", hint: "see `ceph df` and `ceph osd pool get-quota`" },
  ENOSPC: { problem: "the pool or the cluster is full", hint: "see `ceph df`" },
  EPERM: { problem: "the user may not do this", hint: "give it the capabilities of profile rbd" },
  EACCES: { problem: "the user may not do this", hint: "give it the capabilities of profile rbd" },
  EROFS: {
    problem: "the image cannot be written now",
    hint: "another client holds its lock, or it is a mirror's copy",
  },
};

/**
 * @param action "write", "open the image"…, after "cannot"
 * @param result the call's result: -errno
 */
export function rbdError(
  action: string,
  object: string,
  result: number,
  offsetBytes?: number,
  meanings: Record<string, Meaning> = {},
): CowcatcherError {
  const errno = errnoName(result);
  const meaning = meanings[errno] ?? MEANINGS[errno];
  const known = ioError(action, object, Object.assign(new Error(errno), { code: errno }), offsetBytes);
  if (meaning === undefined) return known;
  return new CowcatcherError({
    code: known.code,
    object,
    problem: `cannot ${action}: ${meaning.problem}`,
    hint: meaning.hint,
    offsetBytes,
    errno,
  });
}
