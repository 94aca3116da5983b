// The largest buffer, apart from what allocates it: the command line knows it before anything native is loaded.
import { GiB } from "../units.js";

/** What a typed array has, at most, in the oldest Node that this runs on. */
export const MAX_PAGE_MEMORY_BYTES = 4 * GiB;
