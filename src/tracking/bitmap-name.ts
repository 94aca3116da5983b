// The bitmap that is left in a qcow2 image at a clean end, for a QEMU to write its changes to (recovery.ts asks for it): a
// new one, and a new name, each time, so that an older copy of the image has another one.

const PREFIX = "cowcatcher-tracking-";
const PATTERN = /^cowcatcher-tracking-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/;

/** @param uuid as the head has it */
export function bitmapName(uuid: string): string {
  return PREFIX + uuid;
}

export function isBitmapName(name: string): boolean {
  return PATTERN.test(name);
}
