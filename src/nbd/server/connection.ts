// One client: its socket, its bounds, its life.
//
//   negotiating ──GO / EXPORT_NAME──► transmitting ──► finishing ──► closed
//     │    ▲ └──────────── ABORT, broken bytes ──────────┘
//     └──► securing
//
// - securing: STARTTLS is acknowledged. Nothing is read until the acknowledgement has left; from then on the socket
//   is TLS's, and the negotiation begins anew on what TLS makes of it. Bytes that came with STARTTLS or before the
//   acknowledgement are not the client's own (someone on the way put them there), so they end the connection.
// - finishing: nothing more is handled, input is thrown away; when the last request in flight is answered and the
//   socket has taken the answers (the client has DRAIN_TIMEOUT_MS for that), our side of the socket is closed. The
//   client gets LINGER_MS to close its own.
// - closed: the socket is gone. Devices may still be busy with requests; their answers are dropped, and `onGone` is
//   called when the last one is done.
//
// The socket is paused while a bound (requests in flight, bytes held) is reached: back-pressure, not an error.
// A plain connection is read directly (direct-socket.ts); where TLS is required, by copy.
// Main thread only.

import type { Socket } from "node:net";
import { messageOf } from "../../errors.js";
import { readByCopy, readDirectly, type SocketReader } from "../wire/direct-socket.js";
import type { NbdExport, NbdLogger } from "./export.js";
import { Handshake } from "./handshake.js";
import { CLOSE_DRAIN_MS, DRAIN_TIMEOUT_MS, HANDSHAKE_TIMEOUT_MS, LINGER_MS } from "./limits.js";
import { MAX_OPTION_BYTES, OPTION_HEADER_BYTES } from "../wire/protocol.js";
import { ReceiveBuffer } from "./receive-buffer.js";
import { ReplyQueue } from "./reply-queue.js";
import { acceptTls, type TlsCredentials } from "./tls.js";
import type { SlabPool } from "./slab.js";
import { Transmission } from "./transmission.js";

export interface ConnectionOptions {
  exports: ReadonlyMap<string, NbdExport>;
  pool: SlabPool;
  logger: NbdLogger;
  /** TLS is required; undefined: it is off. */
  tls: TlsCredentials | undefined;
  /** Asked when the client wants in: what to tell one for whom there is no place. */
  refusal: () => string | undefined;
  /** The negotiation has led to an export. */
  onIn: () => void;
  /** The socket is closed and no device works for this client any more. */
  onGone: () => void;
}

export class Connection {
  private socket: Socket;
  private readonly receive: ReceiveBuffer;
  private readonly replies: ReplyQueue;
  private readonly handshake: Handshake;
  private readonly logger: NbdLogger;
  private readonly onIn: () => void;
  private readonly onGone: () => void;
  private transmission: Transmission | undefined;
  private phase: "negotiating" | "securing" | "transmitting" | "finishing" | "closed" = "negotiating";
  private readonly tls: TlsCredentials | undefined;
  /** Set while a socket is read by copy. */
  private stopReading: (() => number) | undefined;
  private isShuttingDown = false;
  private drainTimeoutMs = DRAIN_TIMEOUT_MS;
  private isEnded = false;
  private isGone = false;
  private isFlushScheduled = false;
  private isHandedOver = false;
  private timer: NodeJS.Timeout | undefined;

  constructor(socket: Socket, options: ConnectionOptions) {
    const { exports, pool, logger, tls } = options;
    this.logger = logger;
    this.onIn = options.onIn;
    this.onGone = options.onGone;
    this.tls = tls;
    this.receive = new ReceiveBuffer(pool);
    this.socket = tls === undefined ? readDirectly(socket, this.reader) : socket;
    if (tls !== undefined) this.stopReading = readByCopy(socket, this.reader);
    this.replies = new ReplyQueue(
      pool,
      this.socket,
      () => {
        this.makeProgress();
      },
      (error) => {
        this.logger.warn({ problem: messageOf(error) }, "a reply cannot be completed");
        this.socket.destroy();
      },
    );
    this.handshake = new Handshake(exports, this.replies, tls !== undefined, options.refusal);
    this.listenTo(this.socket);
    this.timer = setTimeout(() => {
      this.logger.warn({}, "client did not finish its negotiation in time");
      this.socket.destroy();
    }, HANDSHAKE_TIMEOUT_MS);
    this.timer.unref();
    this.socket.resume();
    this.handshake.greet();
    this.replies.flush();
  }

  private readonly reader: SocketReader = {
    landing: () => this.receive.landing,
    received: (byteCount) => {
      this.received(byteCount);
    },
  };

  private listenTo(socket: Socket): void {
    socket.on("end", () => {
      if (socket === this.socket) this.finish();
    });
    socket.on("error", (error) => {
      this.logger.debug({ err: error }, "connection broke");
    });
    socket.on("close", () => {
      this.closed();
    });
  }

  /** Answers what is in flight, refuses what still comes, then closes. */
  shutDown(): void {
    this.isShuttingDown = true;
    this.handshake.shuttingDown = true;
    this.transmission?.refuseRequests();
    this.drainTimeoutMs = CLOSE_DRAIN_MS;
    if (this.phase === "securing") this.socket.destroy();
    else if (this.phase === "negotiating") this.finish();
    else if (this.hasOnlyToSend && this.replies.isBusy) this.cutOffAfter(CLOSE_DRAIN_MS);
    else this.makeProgress();
  }

  /** The client may take what it is owed, and no more. */
  private get hasOnlyToSend(): boolean {
    return this.isEnded || (this.phase === "finishing" && this.replies.isUnfinished);
  }

  /** What the client uses, once it has chosen. */
  get nbdExport(): NbdExport | undefined {
    const outcome = this.handshake.outcome;
    return outcome?.kind === "transmission" ? outcome.negotiated.nbdExport : undefined;
  }

  destroy(): void {
    this.socket.destroy();
  }

  private received(byteCount: number): void {
    this.receive.end += byteCount;
    this.process();
    this.receive.prepare(this.needBytes());
    this.settleBounds();
  }

  private get requestsInFlight(): number {
    return this.transmission?.requestsInFlight ?? 0;
  }

  private needBytes(): number {
    return this.transmission?.needBytes ?? OPTION_HEADER_BYTES + MAX_OPTION_BYTES;
  }

  /** Handles what has arrived and hands the answers to the socket. */
  private process(): void {
    const { receive } = this;
    // A broken socket gives back its writes one by one, which look like replies that were taken. To go on with the
    // requests at hand would be to read the disk for nobody, at the expense of those who wait.
    if (this.socket.destroyed || this.replies.isBroken) return void (receive.start = receive.end);
    if (this.phase === "negotiating") this.negotiate();
    if (this.phase === "transmitting" && this.transmission !== undefined) {
      receive.start = this.transmission.consume(receive.slab, receive.start, receive.end);
      if (this.transmission.isStopped) {
        const { stopReason } = this.transmission;
        if (stopReason !== "") this.logger.warn({ reason: stopReason }, "client broke the protocol");
        this.finish();
      }
    }
    if (this.phase === "finishing" || this.phase === "closed") receive.start = receive.end;
    this.replies.flush();
  }

  private negotiate(): void {
    const { receive, handshake } = this;
    receive.start = handshake.consume(receive.slab.bytes, receive.start, receive.end);
    const { outcome } = handshake;
    if (outcome === undefined) return;
    if (outcome.kind === "startTls") return this.beginTls();
    clearTimeout(this.timer);
    if (outcome.kind === "transmission") {
      const { negotiated } = outcome;
      this.phase = "transmitting";
      this.onIn();
      this.transmission = new Transmission(negotiated, receive, this.replies, this.logger, () => {
        this.scheduleProgress();
      });
      this.logger.debug({ export: negotiated.nbdExport.name }, "client connected");
      return;
    }
    if (outcome.kind === "drop") this.logger.warn({ reason: outcome.reason }, "client broke the protocol");
    this.finish();
  }

  /** STARTTLS has just been acknowledged, in bytes that the socket has not taken yet. */
  private beginTls(): void {
    const earlyBytes = (this.stopReading?.() ?? 0) + this.receive.end - this.receive.start;
    this.stopReading = undefined;
    if (earlyBytes > 0) {
      this.logger.warn({ earlyBytes }, "client sent plain text behind STARTTLS");
      return this.finish();
    }
    this.phase = "securing";
  }

  private handOverToTls(tls: TlsCredentials): void {
    const plain = this.socket;
    acceptTls(
      plain,
      tls,
      (secured) => {
        if (this.phase !== "securing") return void secured.destroy();
        this.socket = secured;
        this.listenTo(secured);
        this.replies.useSocket(secured);
        this.handshake.secured();
        this.phase = "negotiating";
        this.stopReading = readByCopy(secured, this.reader);
        secured.resume();
      },
      (reason) => {
        this.logger.warn({ reason }, "TLS handshake failed");
        plain.destroy();
      },
    );
  }

  /** Whole requests or options are left over until the client takes its answers, or devices are done. */
  private get isWaiting(): boolean {
    if (this.phase === "negotiating") return this.handshake.isWaiting;
    return this.phase === "transmitting" && this.transmission?.isWaiting === true;
  }

  /** Pauses or resumes the socket as the bounds ask. */
  private settleBounds(): void {
    if (this.phase === "securing") return;
    const mustWait = this.isWaiting;
    if (mustWait && !this.socket.isPaused()) this.socket.pause();
    else if (!mustWait && this.socket.isPaused()) this.socket.resume();
  }

  /**
   * Requests often settle several at a time, each in a callback of its own; the end of the turn gathers their answers.
   * A write for each would cost the client a wake-up, and the server more than the rest of the request.
   */
  private scheduleProgress(): void {
    // Nobody is left whose answer could go with it.
    if (this.requestsInFlight === 0) return this.flushSettled();
    if (this.isFlushScheduled) return;
    this.isFlushScheduled = true;
    setImmediate(() => {
      this.isFlushScheduled = false;
      this.flushSettled();
    });
  }

  private flushSettled(): void {
    this.replies.flush();
    this.makeProgress();
  }

  private makeProgress(): void {
    if (this.isWaiting) {
      this.process();
      this.settleBounds();
    }
    if (this.phase === "securing" && this.tls !== undefined && !this.replies.isBusy && !this.isHandedOver) {
      this.isHandedOver = true;
      this.handOverToTls(this.tls);
    }
    if (this.phase === "transmitting" && this.isShuttingDown && this.requestsInFlight === 0) this.finish();
    if (this.phase === "finishing") this.endWhenAnswered();
    if (this.phase === "closed") this.goneWhenIdle();
  }

  private finish(): void {
    if (this.phase === "finishing" || this.phase === "closed") return;
    clearTimeout(this.timer);
    this.phase = "finishing";
    this.receive.start = this.receive.end;
    // Paused, it would not notice that the client hangs up.
    if (this.socket.isPaused()) this.socket.resume();
    this.replies.flush();
    if (this.replies.isUnfinished) this.cutOffAfter(this.drainTimeoutMs);
    this.endWhenAnswered();
  }

  private endWhenAnswered(): void {
    if (this.isEnded || this.requestsInFlight > 0 || this.replies.isUnfinished) return;
    this.isEnded = true;
    this.replies.flush();
    this.cutOffAfter(this.drainTimeoutMs);
    this.socket.end(() => {
      clearTimeout(this.timer);
      // The client has all answers; if it has hung up too, this closes the socket, else the timer does.
      if (this.socket.readableEnded) this.socket.destroy();
      else this.linger();
    });
  }

  private cutOffAfter(timeoutMs: number): void {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      this.logger.warn({}, "client did not take its last replies in time");
      this.socket.destroy();
    }, timeoutMs);
  }

  private linger(): void {
    this.socket.on("end", () => {
      this.socket.destroy();
    });
    this.timer = setTimeout(() => {
      this.socket.destroy();
    }, LINGER_MS);
  }

  private closed(): void {
    if (this.phase === "closed") return;
    this.phase = "closed";
    clearTimeout(this.timer);
    this.replies.close();
    this.receive.start = this.receive.end;
    this.receive.release(this.receive.slab);
    this.goneWhenIdle();
  }

  private goneWhenIdle(): void {
    if (this.isGone || this.requestsInFlight > 0) return;
    this.isGone = true;
    this.onGone();
  }
}
