// Numbers as qemu-img prints them, for output that scripts and people know from there.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

/** "196 KiB", "3.26 MiB": three significant digits at most, as QEMU's size_to_str. */
export function qemuSize(bytes: number): string {
  let value = bytes;
  let unit = 0;
  // A value that would need four digits goes to the next unit.
  while (value >= 1000 && unit < UNITS.length - 1) {
    value /= 1024;
    unit++;
  }
  return `${threeDigits(value)} ${UNITS[unit]}`;
}

/** As printf's %0.3g of a value below 1000: of what stands in the middle the even neighbour, as C rounds. */
function threeDigits(value: number): number {
  const scale = value >= 100 ? 1 : value >= 10 ? 10 : value >= 1 ? 100 : 1000;
  // Exact where it matters: a middle is a multiple of 1/1024 and a half digit at once, so few bits hold it.
  const scaled = value * scale;
  const below = Math.floor(scaled);
  const isMiddle = scaled - below === 0.5;
  return (isMiddle ? below + (below % 2) : Math.round(scaled)) / scale;
}

export type JsonValue =
  string | number | boolean | null | undefined | JsonValue[] | { [key: string]: JsonValue };

/** The members of a format's own information: dashes in names become spaces, nested values are indented. */
export function qemuDump(value: { [key: string]: JsonValue } | JsonValue[], indent = 1): string[] {
  const lines: string[] = [];
  const margin = " ".repeat(indent * 4);
  for (const [key, member] of Object.entries(value)) {
    if (member === undefined) continue;
    const name = Array.isArray(value) ? `[${key}]` : key.replaceAll("-", " ");
    if (typeof member === "object" && member !== null) {
      lines.push(`${margin}${name}:`, ...qemuDump(member, indent + 1));
    } else {
      lines.push(`${margin}${name}: ${String(member)}`);
    }
  }
  return lines;
}

/** "0x10000", and plain "0" for zero, as printf's %#x. */
export function qemuHex(value: number): string {
  return value === 0 ? "0" : `0x${value.toString(16)}`;
}
