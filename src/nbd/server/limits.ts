// The server's bounds, each with its reason.

import { KiB, MiB } from "../../units.js";

/**
 * Usual size of a slab. A Unix socket holds about 200 KiB, so one read takes all that has arrived, with room for
 * the rest of the last request behind it.
 */
export const SLAB_BYTES = 512 * KiB;
/** Slabs that a server keeps for reuse: a few of the largest (32 MiB payloads) or many of the usual ones. */
export const MAX_POOLED_BYTES = 64 * MiB;

/** Requests of one connection that may wait for the device; the socket is not read beyond it. */
export const MAX_REQUESTS_IN_FLIGHT = 256;
/**
 * Slabs that one connection may hold before it starts another request. One request more can add twice the
 * largest payload, so a connection never holds more than this and 128 MiB.
 */
export const MAX_SLAB_BYTES_PER_CONNECTION = 48 * MiB;
/**
 * Slabs of all connections together. Beyond it a connection is held to one request at a time, so that clients who
 * do not take their replies cannot each fill up their own bound. 1024 idle connections hold half of it, untouched.
 */
export const MAX_SLAB_BYTES_IN_USE = 1024 * MiB;

/**
 * Replies are sent after this many bytes of requests or of replies, even if more requests are at hand, so that
 * the client works while the server does.
 */
export const FLUSH_AFTER_BYTES = 64 * KiB;

/** From here on a reply's data go by reference to the page cache, which takes a system call more than a small copy. */
export const SEND_CACHED_MIN_BYTES = 64 * KiB;

/** Device errors of one connection that are logged as warnings. */
export const MAX_LOGGED_ERRORS = 10;

/** Writes that may wait in a socket whose client does not read: short replies hold little memory, but each an object. */
export const MAX_WRITES_QUEUED = 1024;

/**
 * Clients at a time that have not finished their negotiation; for a newcomer the oldest of them goes. They say nothing,
 * or little, for nothing: they must not keep a guest from its disk, so they have no part in the places of those that
 * are in. More than a listener's backlog, so that a burst of them does not push out a guest that came just before it.
 */
export const MAX_NEGOTIATING = 256;
/** Of a server's places one address leaves one in so many to others. */
export const PLACES_PER_RESERVED = 16;

/** Options in one negotiation: a client that lists many exports asks for each. */
export const MAX_OPTIONS = 4096;
/** A client that has not finished its negotiation by then is dropped, so that idle sockets cannot use up the server. */
export const HANDSHAKE_TIMEOUT_MS = 30_000;
/** Answers to options that a client may leave unread; no more of its options are looked at beyond it. */
export const MAX_NEGOTIATION_REPLY_BYTES = 4 * MiB;
/** A client that is to be hung up on gets so long to take the answers that it is owed. */
export const DRAIN_TIMEOUT_MS = 30_000;

/** A TCP client that has been silent so long is asked for a sign of life. */
export const KEEP_ALIVE_MS = 60_000;

/** A refused write's payload is read and thrown away up to this; beyond, the connection is dropped. */
export const MAX_DISCARD_BYTES = 64 * MiB;

/** Descriptors in one BLOCK_STATUS reply. Each may cost two system calls on the main thread. */
export const MAX_STATUS_EXTENTS = 512;
/** Questions to the device for one BLOCK_STATUS; a few microseconds each. What is left the client asks again. */
export const MAX_STATUS_QUERIES = 4096;
/** The same for the holes of one read. */
export const MAX_HOLE_QUERIES = 128;
/** Reads from this size on are asked for holes first: below it the question costs more than it saves. */
export const HOLE_SEARCH_MIN_BYTES = 64 * KiB;
/** Chunks in one structured read; the rest is sent as data. */
export const MAX_READ_CHUNKS = 32;

/** How long `close` waits for requests in flight; with what follows it the server ends within 10 s. */
export const CLOSE_TIMEOUT_MS = 8_000;
/** How long of it for a client whose requests are all answered to take the answers. */
export const CLOSE_DRAIN_MS = 3_000;
/** After the last reply the client gets this long to hang up itself, so that no reply is lost to a reset. */
export const LINGER_MS = 1_000;
