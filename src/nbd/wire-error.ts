// Which of NBD's error values a failed device operation becomes.

import { CowcatcherError, errnoOf } from "../errors.js";
import { NBD_EIO, NBD_ENOMEM, NBD_ENOSPC, NBD_EPERM } from "./protocol.js";

/** NBD's eight values are all that the protocol allows; whatever has none of its own is EIO. */
export function nbdErrorOf(error: unknown): number {
  if (error instanceof CowcatcherError && error.code === "NO_SPACE") return NBD_ENOSPC;
  switch (errnoOf(error) ?? (error instanceof CowcatcherError ? error.errno : undefined)) {
    case "EPERM":
    case "EACCES":
    case "EROFS":
      return NBD_EPERM;
    case "ENOMEM":
      return NBD_ENOMEM;
    case "ENOSPC":
    case "EDQUOT":
    case "EFBIG":
      return NBD_ENOSPC;
    default:
      return NBD_EIO;
  }
}
