// Zero detection. Most data shows its first non-zero byte within 16 bytes; what does not is scanned in words,
// eight at a time, at about memory speed.

const words = new WeakMap<ArrayBufferLike, Int32Array>();

function wordsOf(buffer: ArrayBufferLike): Int32Array {
  let view = words.get(buffer);
  if (view === undefined) {
    view = new Int32Array(buffer, 0, buffer.byteLength >> 2);
    words.set(buffer, view);
  }
  return view;
}

/** Whether bytes [from, to) of the view are all zero. Any alignment; fastest where both are multiples of 32. */
export function isZero(view: Uint8Array, from: number, to: number): boolean {
  const start = view.byteOffset + from;
  const end = view.byteOffset + to;
  if ((start & 31) !== 0 || (end & 31) !== 0) return bytesAreZero(view, from, to);
  const w = wordsOf(view.buffer);
  for (let i = start >> 2; i < end >> 2; i += 8) {
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
