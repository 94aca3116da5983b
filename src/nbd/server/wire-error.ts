// Which of NBD's error values a failed device operation becomes.

import { CowcatcherError, errnoOf } from "../../errors.js";
import { NBD_EIO, NBD_ENOMEM, NBD_ENOSPC, NBD_EPERM } from "../wire/protocol.js";

const NBD_ERROR_OF_ERRNO: Readonly<Record<string, number>> = {
  EPERM: NBD_EPERM,
  EACCES: NBD_EPERM,
  EROFS: NBD_EPERM,
  ENOMEM: NBD_ENOMEM,
  ENOSPC: NBD_ENOSPC,
  EDQUOT: NBD_ENOSPC,
  EFBIG: NBD_ENOSPC,
};

/** NBD's few values are all that the protocol allows; whatever has none of its own is EIO. */
export function nbdErrorOf(error: unknown): number {
  const errno = error instanceof CowcatcherError ? error.errno : errnoOf(error);
  const known = errno === undefined ? undefined : NBD_ERROR_OF_ERRNO[errno];
  if (known !== undefined) return known;
  return error instanceof CowcatcherError && error.code === "NO_SPACE" ? NBD_ENOSPC : NBD_EIO;
}
