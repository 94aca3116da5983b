// Zero detection. Most data shows its first non-zero byte within 16 bytes; what does not is scanned in words,
// eight at a time, at about memory speed.
//
// A buffer has up to 4 GiB. A place in it in bytes does not fit into the 32 bits that a shift works on, one in words
// does; so places are divided before they are cut to an integer, which keeps the loop free of floating point.

import { GiB } from "../units.js";

const WORD_BYTES = 4;
/** From here on a place in words does not fit into 31 bits. */
const SCANNED_IN_WORDS_BYTES = 8 * GiB;

const words = new WeakMap<ArrayBufferLike, Int32Array>();

function wordsOf(buffer: ArrayBufferLike): Int32Array {
  let view = words.get(buffer);
  if (view === undefined) {
    view = new Int32Array(buffer, 0, Math.floor(buffer.byteLength / WORD_BYTES));
    words.set(buffer, view);
  }
  return view;
}

/** Whether bytes [from, to) of the view are all zero. Any alignment; fastest from a word on, for a multiple of 32. */
export function isZero(view: Uint8Array, from: number, to: number): boolean {
  const start = view.byteOffset + from;
  const end = view.byteOffset + to;
  if ((start & 3) !== 0 || ((end - start) & 31) !== 0 || end >= SCANNED_IN_WORDS_BYTES)
    return bytesAreZero(view, from, to);
  const w = wordsOf(view.buffer);
  const endWord = (end / WORD_BYTES) | 0;
  for (let i = (start / WORD_BYTES) | 0; i < endWord; i += 8) {
    const any = w[i] | w[i + 1] | w[i + 2] | w[i + 3] | w[i + 4] | w[i + 5] | w[i + 6] | w[i + 7];
    if (any !== 0) return false;
  }
  return true;
}

function bytesAreZero(view: Uint8Array, from: number, to: number): boolean {
  for (let i = from; i < to; i++) {
    if (view[i] !== 0) return false;
  }
  return true;
}

/**
 * End of the run of units from `from` on that each hold data: `from` where the first is zero, `to` where none is.
 * One loop for a whole chunk: a unit with data shows it by its first word as a rule.
 */
export function endOfData(view: Uint8Array, from: number, to: number, unitBytes: number): number {
  const isAligned = ((view.byteOffset + from) | unitBytes) % WORD_BYTES === 0;
  const inWords = isAligned && view.byteOffset + to < SCANNED_IN_WORDS_BYTES;
  const w = wordsOf(view.buffer);
  const wordsPerUnit = (unitBytes / WORD_BYTES) | 0;
  let word = ((view.byteOffset + from) / WORD_BYTES) | 0;
  for (let position = from; position < to; position += unitBytes, word += wordsPerUnit) {
    if (inWords && position + WORD_BYTES <= to && w[word] !== 0) continue;
    if (isZero(view, position, Math.min(position + unitBytes, to))) return position;
  }
  return to;
}
