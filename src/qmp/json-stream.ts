// Splits a byte stream into JSON documents, as both ends of a QMP connection read it.
//
// Documents are not lines: a client may send two in one packet, or one in forty, with newlines inside. So the
// splitter counts braces and brackets, passing over strings and their escapes, and hands each balanced stretch to
// JSON.parse. It never looks at which bracket closes which: `[}` is balanced for it, and JSON.parse refuses it.
//
//   IDLE ──{ or [──► DOCUMENT ──depth 0──► IDLE        document, or a parse error
//     │                 │ over a limit: the error is reported once, the rest is counted but not kept
//     └──any other──► TOKEN ──white space, {, [──► IDLE  scalar or garbage: always an error in QMP
//
// Resynchronising. Balanced garbage costs one error. Two bytes end whatever is being read, with an error, as they
// can stand inside no document's string: a line feed (a client that lost its thread starts a new line) and 0xFE or
// 0xFF, which no UTF-8 text has (QEMU's clients send one on purpose to clear the parser).
//
// Memory: one document's bytes at most (`maxBytes`), copied out of the caller's chunks. One owner, any thread.

export interface JsonStreamLimits {
  /** Longest document, in bytes. */
  maxBytes: number;
  /** Deepest nesting of objects and arrays. */
  maxDepth: number;
}

/** A parsed document, or what was wrong with the bytes, in QEMU's words where QEMU has some. */
export type JsonItem = { value: unknown } | { error: string };

const TOKEN_BYTES_KEPT = 64;
const FIRST_BUFFER_BYTES = 4096;

const LINE_FEED = 0x0a;
const QUOTE = 0x22;
const BACKSLASH = 0x5c;
const OPEN_BRACE = 0x7b;
const CLOSE_BRACE = 0x7d;
const OPEN_BRACKET = 0x5b;
const CLOSE_BRACKET = 0x5d;
const FIRST_NON_UTF8 = 0xfe;

const enum Mode {
  Idle,
  Document,
  Token,
}

/** The splitter. What is wrong with the bytes, or over a limit, comes as an item, in its place; nothing is thrown. */
export class JsonStream {
  readonly #limits: JsonStreamLimits;
  #mode = Mode.Idle;
  #inString = false;
  #escaped = false;
  #depth = 0;
  /** The document broke a limit: it is counted to its end, but no longer kept. */
  #skipping = false;
  #buffer = Buffer.alloc(FIRST_BUFFER_BYTES);
  #length = 0;

  constructor(limits: JsonStreamLimits) {
    this.#limits = limits;
  }

  /** Takes the next bytes and returns what they complete, in order. Never throws. */
  push(chunk: Uint8Array): JsonItem[] {
    const items: JsonItem[] = [];
    let startIndex = 0;
    for (let index = 0; index < chunk.length; index++) {
      const byte = chunk[index];
      if (byte >= FIRST_NON_UTF8) {
        this.#abandon(items, "stray '\uFFFD'");
      } else if (this.#mode === Mode.Document) {
        if (this.#endsDocument(byte, items)) {
          this.#keep(chunk, startIndex, index + 1, items);
          this.#finishDocument(items);
        }
      } else {
        startIndex = index;
        this.#outside(byte, items);
      }
    }
    if (this.#mode === Mode.Document) this.#keep(chunk, startIndex, chunk.length, items);
    return items;
  }

  /** One byte while no document is open: it opens one, ends or lengthens a token, or is white space. */
  #outside(byte: number, items: JsonItem[]): void {
    if (this.#mode === Mode.Token) {
      if (this.#inString) {
        this.#stringByte(byte, items);
        if (this.#mode === Mode.Token) this.#keepToken(byte);
        if (this.#mode === Mode.Token && !this.#inString) this.#finishToken(items);
        return;
      }
      if (!endsToken(byte)) {
        this.#keepToken(byte);
        return;
      }
      this.#finishToken(items);
    }
    if (isWhiteSpace(byte)) return;
    if (byte === OPEN_BRACE || byte === OPEN_BRACKET) {
      this.#mode = Mode.Document;
      this.#depth = 1;
      return;
    }
    this.#mode = Mode.Token;
    this.#inString = byte === QUOTE;
    this.#keepToken(byte);
  }

  /** True when this byte closes the document's outermost bracket. */
  #endsDocument(byte: number, items: JsonItem[]): boolean {
    if (this.#inString) {
      this.#stringByte(byte, items);
    } else if (byte === QUOTE) {
      this.#inString = true;
    } else if (byte === OPEN_BRACE || byte === OPEN_BRACKET) {
      this.#depth++;
      if (this.#depth > this.#limits.maxDepth) this.#skip(items, "JSON nesting depth limit exceeded");
    } else if (byte === CLOSE_BRACE || byte === CLOSE_BRACKET) {
      this.#depth--;
      return this.#depth === 0;
    }
    return false;
  }

  #stringByte(byte: number, items: JsonItem[]): void {
    if (byte === LINE_FEED) this.#abandon(items, "line feed in a string");
    else if (this.#escaped) this.#escaped = false;
    else if (byte === BACKSLASH) this.#escaped = true;
    else if (byte === QUOTE) this.#inString = false;
  }

  #keep(chunk: Uint8Array, startIndex: number, endIndex: number, items: JsonItem[]): void {
    const lengthAfter = this.#length + endIndex - startIndex;
    if (lengthAfter > this.#limits.maxBytes) {
      this.#skip(items, `JSON document size limit of ${this.#limits.maxBytes} bytes exceeded`);
    }
    if (this.#skipping) return;
    if (lengthAfter > this.#buffer.length) {
      const larger = Buffer.alloc(
        Math.min(this.#limits.maxBytes, Math.max(lengthAfter, 2 * this.#buffer.length)),
      );
      larger.set(this.#buffer.subarray(0, this.#length));
      this.#buffer = larger;
    }
    this.#buffer.set(chunk.subarray(startIndex, endIndex), this.#length);
    this.#length = lengthAfter;
  }

  #keepToken(byte: number): void {
    if (this.#length < TOKEN_BYTES_KEPT) this.#buffer[this.#length++] = byte;
  }

  #finishDocument(items: JsonItem[]): void {
    if (!this.#skipping) items.push(parse(this.#buffer.subarray(0, this.#length)));
    this.#reset();
  }

  #finishToken(items: JsonItem[]): void {
    const bytes = this.#buffer.subarray(0, this.#length);
    const text = bytes.toString("utf8");
    if ("value" in parse(bytes)) items.push({ error: "QMP input must be a JSON object" });
    else if (/^[a-z]+$/.test(text)) items.push({ error: `JSON parse error, invalid keyword '${text}'` });
    else if (/^[}\],:]/.test(text)) items.push({ error: "JSON parse error, expecting value" });
    else items.push({ error: `JSON parse error, stray '${text}'` });
    this.#reset();
  }

  #skip(items: JsonItem[], error: string): void {
    if (!this.#skipping) items.push({ error });
    this.#skipping = true;
  }

  #abandon(items: JsonItem[], what: string): void {
    if (!this.#skipping) items.push({ error: `JSON parse error, ${what}` });
    this.#reset();
  }

  #reset(): void {
    this.#mode = Mode.Idle;
    this.#inString = false;
    this.#escaped = false;
    this.#depth = 0;
    this.#skipping = false;
    this.#length = 0;
    if (this.#buffer.length > FIRST_BUFFER_BYTES) this.#buffer = Buffer.alloc(FIRST_BUFFER_BYTES);
  }
}

const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

function parse(bytes: Uint8Array): JsonItem {
  let text: string;
  try {
    text = decoder.decode(bytes);
  } catch {
    return { error: "JSON parse error, invalid UTF-8" };
  }
  try {
    return { value: JSON.parse(text) as unknown };
  } catch (cause) {
    return { error: `JSON parse error, ${cause instanceof Error ? cause.message : String(cause)}` };
  }
}

function isWhiteSpace(byte: number): boolean {
  return byte === 0x20 || (byte >= 0x09 && byte <= 0x0d);
}

function endsToken(byte: number): boolean {
  return isWhiteSpace(byte) || byte === OPEN_BRACE || byte === OPEN_BRACKET || byte === QUOTE;
}
