// Reading an option's data: lengths and strings, none of which may leave it.

import { MAX_STRING_BYTES } from "../wire/protocol.js";

/** A cursor over an option's data; a read past its end gives undefined, which makes the option invalid. */
export class OptionData {
  private at = 0;
  constructor(private readonly data: Buffer) {}

  get remainingBytes(): number {
    return this.data.length - this.at;
  }

  uint16(): number | undefined {
    if (this.remainingBytes < 2) return undefined;
    this.at += 2;
    return this.data.readUInt16BE(this.at - 2);
  }

  uint32(): number | undefined {
    if (this.remainingBytes < 4) return undefined;
    this.at += 4;
    return this.data.readUInt32BE(this.at - 4);
  }

  /** A 32-bit length and that many bytes of UTF-8. */
  string(): string | undefined {
    const lengthBytes = this.uint32();
    if (lengthBytes === undefined || lengthBytes > MAX_STRING_BYTES || lengthBytes > this.remainingBytes) {
      return undefined;
    }
    this.at += lengthBytes;
    const text = this.data.toString("utf8", this.at - lengthBytes, this.at);
    // The protocol's strings hold no NUL.
    return text.includes("\0") ? undefined : text;
  }
}

/** A 32-bit count and that many strings, to the end of the data. */
export function readQueries(cursor: OptionData): string[] | undefined {
  const queryCount = cursor.uint32();
  if (queryCount === undefined) return undefined;
  const queries: string[] = [];
  // A query takes four bytes at least, so the option's own bound also bounds this loop.
  for (let i = 0; i < queryCount; i++) {
    const query = cursor.string();
    if (query === undefined) return undefined;
    queries.push(query);
  }
  return cursor.remainingBytes === 0 ? queries : undefined;
}
