/** What suits each kind of view: the number that is drawn, and the columns of its table. */

export const QUANTILES = [0.5, 0.9, 0.99];
export const BAND = Array.from({ length: 19 }, (_, i) => (i + 1) / 20);

const plain = (name) => ({ columns: [name], cells: (it) => [it], number: (it) => it, quantiles: [] });
const KINDS = {
  histogram: {
    columns: ["count", "mean", "p50", "p90", "p99", "max"],
    cells: (it) => [it.count, it.mean, ...QUANTILES.map((q) => it.quantiles[q]), it.max],
    number: (it) => it.quantiles[0.5],
    quantiles: [...QUANTILES, ...BAND.filter((q) => !QUANTILES.includes(q))],
  },
  distinct: {
    columns: ["estimate", "at least", "at most"],
    cells: (it) => [it.estimate, it.lower, it.upper],
    number: (it) => it.estimate,
    quantiles: [],
  },
  topk: {
    columns: ["total", "most frequent"],
    cells: (it) => [it.total, it.items.slice(0, 3).map((item) => item.item).join(", ")],
    number: (it) => it.total,
    quantiles: [],
  },
};

/** Returns the columns, cells, number and quantiles of a kind; a kind that is not known here is shown as it comes. */
export function kind(name) {
  return KINDS[name] ?? plain(name);
}

/** Returns the kind of a view in words, as `pipeline views ls` has it. */
export function described({ kind: name, monotone, window_s }) {
  return `${monotone ? "monotone " : ""}${name}${window_s === null ? "" : ` per ${window_s} s`}`;
}

/** Returns what a value is drawn as, or null: a number that may be rounded. */
export function drawn(name, value) {
  if (value === null || value === undefined) return null;
  const number = typeof value === "object" ? kind(name).number(value) : value;
  return typeof number === "number" || typeof number === "bigint" ? Number(number) : null;
}
