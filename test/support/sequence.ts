// What a guest that writes a sequence (guest.py) has left on the disk, or on the disks, that it writes in turn.
import { expect } from "vitest";

/** Places that each connection writes to: guest.py's SEQUENCE_BLOCKS. */
const COUNT = 64;

/** The last number of the prefix that the images show; fails unless they show exactly a prefix. */
export function prefixOf(images: readonly Buffer[], connectionCount: number): number {
  const sizeBytes = images[0]?.length ?? 0;
  const stride = Math.floor(sizeBytes / COUNT);
  const found = Array.from({ length: COUNT * connectionCount }, (_, place) => {
    const which = place % connectionCount;
    const block = (Math.floor(place / connectionCount) * 37) % COUNT;
    const offset = block * stride + which * Math.floor(stride / connectionCount);
    const image = images[images.length === 1 ? 0 : which];
    return Number(image?.readBigUInt64LE(offset));
  });
  const last = Math.max(...found);
  const expected = found.map((_, place) => {
    const number = last - ((last - place) % found.length);
    return number > 0 ? number : 0;
  });
  expect(found).toEqual(expected);
  return last;
}
