// Medians, percentiles and the tables that show them.

export function median(values: readonly number[]): number {
  return percentile(values, 0.5);
}

/** Linear between neighbours; NaN for no values. */
export function percentile(values: readonly number[], fraction: number): number {
  const sorted = [...values].sort((a, b) => a - b);
  const at = (sorted.length - 1) * fraction;
  const low = sorted[Math.floor(at)] ?? NaN;
  const high = sorted[Math.ceil(at)] ?? NaN;
  return low + (high - low) * (at - Math.floor(at));
}

/** The median of one figure over several measurements; undefined ones (a backup that was cancelled) are left out. */
export function medianOf<T>(items: readonly T[], figure: (item: T) => number | undefined): number {
  return median(items.map(figure).filter((value) => value !== undefined));
}

/** One figure against another, each pair of the same round; rounds that lack one of them are left out. */
export function ratiosOfRounds<T>(
  items: readonly T[],
  others: readonly T[],
  figure: (item: T) => number | undefined,
): number[] {
  return items.flatMap((item, round) => {
    const other = others[round];
    const [a, b] = [figure(item), other && figure(other)];
    return a === undefined || b === undefined ? [] : [a / b];
  });
}

/** Three significant digits, with thousands separators; a dash for what was not measured. */
export function formatFigure(value: number): string {
  if (!Number.isFinite(value)) return "–";
  const magnitude = Math.abs(value);
  const digits = magnitude >= 100 ? 0 : magnitude >= 10 ? 1 : 2;
  return value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

export function markdownTable(header: readonly string[], rows: readonly (readonly string[])[]): string {
  const line = (cells: readonly string[]): string => `| ${cells.join(" | ")} |`;
  // The first column is text, the others are figures.
  const ruler = line(header.map((_, index) => (index === 0 ? "---" : "---:")));
  return [line(header), ruler, ...rows.map(line)].join("\n");
}
