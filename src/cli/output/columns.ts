// Tables for people: columns as wide as their widest cell, two spaces between.

/** What a table may take where nobody knows the terminal: in mail, in logs. */
const TABLE_COLUMNS = 80;
const GAP = 2;
/** Of the first cell, what is left in any case. */
const MIN_NAME = 8;

export function alignColumns(rows: readonly string[][]): string[] {
  const widths = widthsOf(rows);
  return rows.map((row) =>
    row
      .map((cell, column) => cell.padEnd(widths[column] ?? 0))
      .join(" ".repeat(GAP))
      .trimEnd(),
  );
}

/** As alignColumns, with the first cells cut so that no line is longer than `columns`, as far as that will do. */
export function fitColumns(rows: readonly string[][], columns = TABLE_COLUMNS): string[] {
  const others = widthsOf(rows).slice(1);
  const room = columns - others.reduce((sum, width) => sum + GAP + width, 0);
  const limit = Math.max(MIN_NAME, room);
  return alignColumns(
    rows.map(([name = "", ...cells]) => [
      name.length > limit ? `${name.slice(0, limit - 1)}…` : name,
      ...cells,
    ]),
  );
}

function widthsOf(rows: readonly string[][]): number[] {
  return rows[0]?.map((_, column) => Math.max(...rows.map((row) => row[column]?.length ?? 0))) ?? [];
}
