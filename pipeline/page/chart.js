/** Draws: sparklines, lines over time, heatmaps of quantiles, bars. Tables beside them say the same in text. */

import { h, svg, shown } from "./dom.js";

const COLORS = ["#1f6feb", "#d1570a", "#2da44e", "#bf3989", "#8250df", "#0a7d91", "#9a6700", "#cf222e", "#57606a", "#6f42c1"];
export const LINES_MAX = COLORS.length;

export function color(i) {
  return COLORS[i % COLORS.length];
}

/** Returns a line of values; null is a gap. */
export function sparkline(values, label) {
  const there = values.filter((it) => it !== null);
  const [least, most] = [Math.min(0, ...there), Math.max(...there)];
  const points = values.map((value, i) => (value === null ? "" :
    `${(i / Math.max(1, values.length - 1)) * 118 + 1},${25 - ((value - least) / (most - least || 1)) * 24}`)).join(" ");
  return svg("svg", { class: "spark", viewBox: "0 0 120 26", role: "img", "aria-label": label },
    ...(there.length > 1 ? [svg("polyline", { points })] : []));
}

/** Returns a time as the reader's language writes it, as exactly as ticks that are `step` seconds apart need it. */
function clock(ms, step) {
  const options = step >= 86_400 ? { month: "short", day: "numeric" }
    : { hour: "2-digit", minute: "2-digit", ...(step < 60 ? { second: "2-digit" } : {}) };
  return new Intl.DateTimeFormat(undefined, options).format(ms);
}

function innerWidth(element) {
  const { paddingLeft, paddingRight } = getComputedStyle(element);
  return Math.max(200, element.clientWidth - parseFloat(paddingLeft) - parseFloat(paddingRight));
}

/** A chart of lines in an element; `draw` replaces its data. */
export class Lines {
  constructor(element) {
    this.element = element;
    this.plot = null;
    this.names = "";
    this.resizing = new ResizeObserver(() => this.plot?.setSize(this.size()));
    this.resizing.observe(element);
  }

  size() {
    return { width: innerWidth(this.element), height: 290 };
  }

  /** Draws `lines`, each {name, points}; a point is [time in ms, number]. */
  draw(lines) {
    const times = [...new Set(lines.flatMap((it) => it.points.map((point) => point[0])))].sort((a, b) => a - b);
    const data = [times.map((at) => at / 1000), ...lines.map((line) => {
      const values = new Map(line.points);
      return times.map((at) => values.get(at) ?? null);
    })];
    const names = JSON.stringify(lines.map((it) => it.name));
    if (this.plot !== null && names === this.names) {
      this.plot.setData(data);
      return;
    }
    this.names = names;
    this.plot?.destroy();
    const style = getComputedStyle(document.documentElement);
    const axis = { font: "12px system-ui", stroke: style.getPropertyValue("--soft"), grid: { stroke: style.getPropertyValue("--grid") } };
    this.plot = new uPlot({
      ...this.size(),
      legend: { show: false },
      cursor: { drag: { setScale: false } },
      scales: { y: { range: (_, least, most) => (least === null ? [0, 1] : uPlot.rangeNum(Math.min(0, least), most, 0.1, true)) } },
      axes: [{ ...axis, space: 90, size: 30, values: (_, ticks, i, space, step) => ticks.map((at) => clock(at * 1000, step)) }, { ...axis, size: 64, values: (_, ticks) => ticks.map(shown) }],
      series: [{}, ...lines.map((it, i) => ({ label: it.name, stroke: color(i), width: 1.5, points: { show: (plot) => plot.data[0].length < 3 } }))],
    }, data, this.element);
    this.plot.root.setAttribute("role", "img");
    this.plot.root.setAttribute("aria-label", `Lines over time: ${lines.map((it) => it.name).join(", ")}`);
  }

  close() {
    this.resizing.disconnect();
    this.plot?.destroy();
  }
}

/** A heatmap of quantiles: between two neighbouring ones lies the same share of observations, so narrow bands are dark. */
export class Heatmap {
  constructor(element) {
    this.canvas = h("canvas", { role: "img", "aria-label": "Heatmap: how observations are spread over time" });
    this.element = element;
    element.append(this.canvas);
  }

  /** Draws columns, each [time in ms, ascending values of equally distant quantiles]. */
  draw(columns, startMs, endMs, stepMs) {
    const values = columns.flatMap((it) => it[1]);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const scale = low > 0 ? Math.log : (it) => it;
    const [bottom, top] = [scale(low), scale(high)];
    const width = innerWidth(this.element), height = 180, left = 64;
    const dots = window.devicePixelRatio || 1;
    Object.assign(this.canvas, { width: width * dots, height: height * dots });
    this.canvas.style.width = `${width}px`;
    const ink = this.canvas.getContext("2d");
    ink.scale(dots, dots);
    if (!values.length) return;
    const y = (value) => 6 + (1 - (scale(value) - bottom) / (top - bottom || 1)) * (height - 12);
    const x = (at) => left + ((at - startMs) / (endMs - startMs)) * (width - left);
    const heights = columns.map(([, row]) => row.slice(1).map((it, i) => Math.max(1, y(row[i]) - y(it))));
    for (const [n, [at, row]] of columns.entries()) {
      for (const [i, tall] of heights[n].entries()) {
        ink.globalAlpha = Math.min(1, 6 / (tall + 5));
        ink.fillStyle = COLORS[0];
        ink.fillRect(x(at), y(row[i + 1]), Math.max(1, x(at + stepMs) - x(at) - 0.5), tall);
      }
    }
    ink.globalAlpha = 1;
    ink.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--soft");
    ink.font = "12px system-ui";
    ink.textBaseline = "middle";
    for (const value of [low, high]) ink.fillText(shown(value), 2, Math.min(height - 8, Math.max(8, y(value))));
  }

  close() {}
}

/** Returns bars of [name, number, text]. */
export function bars(rows) {
  const most = Math.max(1, ...rows.map((it) => it[1]));
  return h("div", { class: "bars" }, rows.flatMap(([name, value, text]) => [
    h("span", {}, name), h("meter", { min: 0, max: most, value, "aria-label": name }), h("span", { class: "number" }, text)]));
}
