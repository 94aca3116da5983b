// A line chart as SVG, legible on light and dark pages.

export interface ChartSeries {
  name: string;
  points: readonly { x: number; y: number }[];
  /** Vertical marks: where the backup begins and ends. */
  marks: readonly number[];
}

const WIDTH = 840;
const HEIGHT = 380;
const MARGIN = { top: 48, right: 20, bottom: 76, left: 76 };
/** The names need more room than the axes. */
const LEGEND_LEFT = 16;
const COLOURS = ["#c2410c", "#0f766e", "#a16207", "#1d4ed8", "#7e22ce"];
const TICKS = 5;

export function lineChart(
  title: string,
  xLabel: string,
  yLabel: string,
  series: readonly ChartSeries[],
): string {
  const points = series.flatMap((one) => one.points);
  const xMax = niceMaximum(Math.max(1, ...points.map(({ x }) => x)));
  const yMax = niceMaximum(Math.max(1, ...points.map(({ y }) => y)));
  const toX = (x: number): number => round(MARGIN.left + (x / xMax) * (WIDTH - MARGIN.left - MARGIN.right));
  const toY = (y: number): number =>
    round(HEIGHT - MARGIN.bottom - (y / yMax) * (HEIGHT - MARGIN.top - MARGIN.bottom));
  const parts = [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${HEIGHT}" font-family="sans-serif" font-size="13">`,
    `<rect width="${WIDTH}" height="${HEIGHT}" fill="#ffffff"/>`,
    `<text x="${WIDTH / 2}" y="26" text-anchor="middle" font-size="16">${escape(title)}</text>`,
    ...grid(xMax, yMax, toX, toY),
    `<text x="${WIDTH / 2}" y="${HEIGHT - MARGIN.bottom + 38}" text-anchor="middle">${escape(xLabel)}</text>`,
    `<text transform="rotate(-90)" x="${-HEIGHT / 2}" y="18" text-anchor="middle">${escape(yLabel)}</text>`,
    ...series.flatMap((one, index) => drawSeries(one, index, series.length, toX, toY)),
    "</svg>",
  ];
  return parts.join("\n");
}

type Scale = (value: number) => number;

function grid(xMax: number, yMax: number, toX: Scale, toY: Scale): string[] {
  const lines: string[] = [];
  for (let tick = 0; tick <= TICKS; tick++) {
    const [x, y] = [(xMax * tick) / TICKS, (yMax * tick) / TICKS];
    lines.push(
      `<path d="M${toX(0)} ${toY(y)}H${toX(xMax)}" stroke="#e5e7eb"/>`,
      `<text x="${toX(0) - 8}" y="${toY(y) + 4}" text-anchor="end">${y.toLocaleString("en-US")}</text>`,
      `<text x="${toX(x)}" y="${toY(0) + 18}" text-anchor="middle">${x}</text>`,
    );
  }
  return lines;
}

function drawSeries(
  { name, points, marks }: ChartSeries,
  index: number,
  count: number,
  toX: Scale,
  toY: Scale,
): string[] {
  const colour = COLOURS[index % COLOURS.length];
  const path = points.map(({ x, y }, at) => `${at === 0 ? "M" : "L"}${toX(x)} ${toY(y)}`).join("");
  const legendX = LEGEND_LEFT + (index * (WIDTH - LEGEND_LEFT)) / count;
  const legendY = HEIGHT - 14;
  return [
    `<path d="${path}" fill="none" stroke="${colour}" stroke-width="2"/>`,
    ...marks.map(
      (x) =>
        `<path d="M${toX(x)} ${MARGIN.top}V${toY(0)}" stroke="${colour}" stroke-dasharray="3 4" opacity="0.7"/>`,
    ),
    `<path d="M${legendX} ${legendY - 4}h22" stroke="${colour}" stroke-width="3"/>`,
    `<text x="${legendX + 28}" y="${legendY}">${escape(name)}</text>`,
  ];
}

/** The least 1, 2, 2.5 or 5 times a power of ten that is not below the value. */
function niceMaximum(value: number): number {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * ([1, 2, 2.5, 5].find((factor) => factor * power >= value) ?? 10);
}

function round(value: number): number {
  return Math.round(value * 10) / 10;
}

function escape(text: string): string {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
}
