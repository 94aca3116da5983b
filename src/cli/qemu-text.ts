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
  return `${Number(value.toPrecision(3))} ${UNITS[unit]}`;
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
