/** The page of one view: what to select, a chart and a table that move with every commit, and lines to copy. */

import { send, token } from "./access.js";
import { fetchJson, key, path, reason, watch } from "./api.js";
import { bars, color, Heatmap, Lines, LINES_MAX } from "./chart.js";
import { h, problem, shown, table } from "./dom.js";
import { BAND, described, drawn, kind, QUANTILES } from "./kinds.js";

const RANGES = { live: 300, "15 min": 900, "1 h": 3_600, "24 h": 86_400 };
const POINTS = 60;
const ROWS_MAX = 200;
const HISTORY_MAX = 600;
const OTHER = "own";
const RATE_MS = 5_000;
const LOOK_MS = 2_000;

/** Shows a view as `state`, the parameters of the page's address, says. `go` changes the address. */
export function showView(main, name, state, go) {
  const place = h("div");
  const stop = new AbortController();
  let retry = 0;
  let close = () => {};
  let shownOf = ""; // definition and labels that are shown
  main.replaceChildren(h("h1", {}, name), place);

  /** Looks for the view's definitions again and again: a view exists once its first delta is folded, and can change later. */
  async function look() {
    try {
      const { views } = await fetchJson("v1/views", undefined, stop.signal, !shownOf);
      const definitions = views.filter((it) => it.name === name);
      const definition = definitions.find((it) => it.answers) ?? definitions[0];
      if (definition) showOnce(definition, definitions);
      else if (!shownOf) place.replaceChildren(problem(`There is no view ${name}, or not yet.`));
    } catch (error) {
      if (!shownOf && !stop.signal.aborted) place.replaceChildren(problem(error.message));
    }
    if (!stop.signal.aborted) retry = setTimeout(look, LOOK_MS);
  }

  function showOnce(definition, definitions) {
    const { kind: of, window_s, monotone } = definition;
    const labels = [...new Set(definitions.filter((it) => it.kind === of && it.window_s === window_s).flatMap((it) => it.labels))].sort();
    const wanted = JSON.stringify([of, window_s, monotone, labels]);
    if (wanted === shownOf) return;
    close();
    close = () => {};
    shownOf = "";
    close = run(place, definition, labels, state, go);
    shownOf = wanted; // not before: `look` shows why `run` fails
  }

  look();
  return () => {
    stop.abort();
    clearTimeout(retry);
    close();
  };
}

function run(place, definition, labels, state, go) {
  const read = readOf(definition, labels, state);
  const chart = h("div", { class: "chart panel" }), rows = h("div"), trouble = h("div");
  const heat = h("div", { class: "panel", hidden: true }, h("div", { class: "soft" }, "How observations are spread, from the 5th to the 95th percentile"));
  const lines = new Lines(chart);
  const heatmap = definition.kind === "histogram" && read.windowed ? new Heatmap(heat) : null;
  const history = new Map(); // of views without windows: by series, the points since this page is open
  const unsaved = h("div");
  const link = h("p", {}, h("a", { href: path(definition.name, read.query), download: `${definition.name}.csv`,
    onclick: (event) => downloadCsv(event, definition.name, read.query, unsaved) }, "Download as CSV"));
  place.replaceChildren(h("p", { class: "soft about" }, `${described(definition)}${labels.length ? ` by ${labels.join(", ")}` : ""}`),
    ...controls(definition, labels, state, go), trouble,
    h("div", { class: "columns" }, h("div", {}, chart, ...(heatmap ? [heat] : [])), h("div", {}, rows, link, unsaved)),
    h("h2", {}, "The same elsewhere"), copyLines(definition, read, state));

  function show(answer) {
    trouble.replaceChildren();
    const series = answer.series.map((it) => ({ ...it, name: Object.values(it.labels).join(" · ") || "all" }));
    const points = read.windowed ? series.map((it) => it.points ?? []) : series.map((it) => remember(history, definition, it));
    const last = points.map((it) => drawn(definition.kind, it.at(-1)?.[1]) ?? 0);
    const order = [...series.keys()].sort((a, b) => last[b] - last[a]);
    const rate = rises(definition);
    const drawnAs = (it) => [it[0], typeof it[1] === "object" || !read.windowed ? drawn(definition.kind, it[1]) : Number(it[1])];
    const kept = answer.series.length > LINES_MAX ? order.slice(0, LINES_MAX) : [...series.keys()];
    if (definition.kind === "topk" && !read.windowed) showBars(chart, lines, series);
    else if (definition.kind === "histogram" && series.length === 1) lines.draw(percentiles(points[0]));
    else lines.draw(kept.map((i) => ({ name: series[i].name, points: (rate ? rates(points[i]) : points[i].map(drawnAs)).filter((it) => it[1] !== null) })));
    if (heatmap && series.length === 1) {
      heatmap.draw(points[0].map(([at, it]) => [at, BAND.map((q) => it.quantiles[q])]), answer.start_ms, answer.end_ms, answer.step_ms);
    }
    heat.hidden = series.length !== 1;
    rows.replaceChildren(tableOf(definition, read, answer, series, points, kept, rate));
  }

  const stop = watch(definition.name, read.query, show, (text) => trouble.replaceChildren(problem(text)));
  return () => {
    stop();
    lines.close();
    heatmap?.close();
  };
}

/** Returns the labels to group by: those that the address names, or the first if it names none that the view has. */
function chosen(labels, state) {
  const wanted = state.getAll("by");
  if (wanted.includes("-")) return [];
  const found = wanted.filter((it) => labels.includes(it));
  return found.length ? found : labels.slice(0, 1);
}

/** Returns the parameters of the read, and what it covers. */
function readOf(definition, labels, state) {
  const windowed = definition.window_s !== null;
  const by = chosen(labels, state);
  const query = { where: state.getAll("where").filter(Boolean), by: by.length ? by : "",
    kind: definition.kind, q: kind(definition.kind).quantiles, limit: 1_000 };
  if (!windowed) return { query, windowed, by: query.by || [] };
  query.window_s = definition.window_s;
  let span = RANGES[state.get("range") ?? "live"] ?? RANGES.live;
  if (state.get("range") === OTHER && state.get("start")) {
    query.start = new Date(state.get("start")).toISOString();
    if (state.get("end")) query.end = new Date(state.get("end")).toISOString();
    span = (Date.parse(query.end ?? new Date().toISOString()) - Date.parse(query.start)) / 1000;
  }
  query.step = Math.max(1, Math.ceil(span / POINTS / definition.window_s)) * definition.window_s;
  if (!query.start) span = query.step * POINTS; // what a read without a start covers
  if (definition.kind === "sum" && (state.get("fn") ?? (definition.monotone ? "rate" : "")) === "rate") query.fn = "rate";
  return { query, windowed, by: query.by || [], span };
}

function controls(definition, labels, state, go) {
  const windowed = definition.window_s !== null;
  const form = h("form", { class: "panel", onsubmit: submit });
  if (!windowed && !labels.length) return []; // there is nothing to choose
  const where = h("input", { id: "where", name: "where", size: 28, placeholder: labels.length ? `${labels[0]}=a, ${labels[0]}!~b.*` : "",
    value: state.getAll("where").join(", "), autocomplete: "off" });
  const by = labels.map((it) => h("label", {}, h("input", { type: "checkbox", name: "by", value: it, onchange: submit,
    checked: chosen(labels, state).includes(it) }), it));
  const range = h("select", { id: "range", name: "range", onchange: submit }, [...Object.keys(RANGES), OTHER].map((it) =>
    h("option", { value: it, selected: it === (state.get("range") ?? "live") }, it)));
  const times = ["start", "end"].map((name) => h("label", { for: name }, name,
    h("input", { id: name, name, type: "datetime-local", value: state.get(name) ?? "", onchange: submit })));
  const fn = h("select", { id: "fn", name: "fn", onchange: submit }, ["rate", "value"].map((it) =>
    h("option", { value: it, selected: it === (state.get("fn") ?? (definition.monotone ? "rate" : "value")) }, it === "rate" ? "per second" : "per step")));

  function submit(event) {
    event.preventDefault();
    const next = new URLSearchParams();
    for (const it of where.value.split(",")) if (it.trim()) next.append("where", it.trim());
    const kept = [...form.querySelectorAll("input[name=by]:checked")].map((it) => it.value);
    for (const it of kept.length ? kept : ["-"]) next.append("by", it);
    if (windowed) {
      next.set("range", range.value);
      if (range.value === OTHER) for (const it of form.querySelectorAll("[type=datetime-local]")) if (it.value) next.set(it.name, it.value);
      if (definition.kind === "sum") next.set("fn", fn.value);
    }
    go(next);
  }

  form.append(...(labels.length ? [h("label", { for: "where" }, "Only series with", where),
    h("fieldset", {}, h("legend", {}, "Group by"), h("div", { class: "choices" }, by))] : []),
    ...(windowed ? [h("label", { for: "range" }, "Range", range), ...(state.get("range") === OTHER ? times : []),
      ...(definition.kind === "sum" ? [h("label", { for: "fn" }, "Show", fn)] : [])]
      : definition.kind === "topk" ? [] : [h("span", { class: "soft" }, "No windows: the chart begins when this page is opened.")]),
    h("button", { type: "submit" }, "Show"));
  return [form];
}

function remember(history, definition, series) {
  const name = key(series.labels);
  const points = history.get(name) ?? [];
  points.push([Date.now(), series.value]);
  if (points.length > HISTORY_MAX) points.shift();
  history.set(name, points);
  return points;
}

function percentiles(points) {
  return QUANTILES.map((q) => ({ name: `p${q * 100}`, points: points.map(([at, it]) => [at, it.quantiles[q]]) }));
}

function showBars(chart, lines, series) {
  lines.close();
  chart.replaceChildren(...series.slice(0, LINES_MAX).map((it) => h("div", {}, series.length > 1 ? h("h2", {}, it.name) : null,
    bars(it.value.items.slice(0, LINES_MAX).map((item) => [item.item, Number(item.count),
      item.count === item.upper ? shown(item.count) : `${shown(item.count)} to ${shown(item.upper)}`])))));
}

/** Returns whether values only rise while the page is open, so that their change per second says more. */
function rises(definition) {
  return definition.window_s === null && definition.kind === "sum" && definition.monotone;
}

/** Returns points of the change per second, each over about RATE_MS. */
function rates(points) {
  let first = 0;
  return points.slice(1).map(([at, value], i) => {
    while (first < i && at - points[first + 1][0] >= RATE_MS) first += 1;
    const [since, before] = points[first];
    return [at, Number(value) < Number(before) ? null : ((Number(value) - Number(before)) / (at - since)) * 1000];
  });
}

function tableOf(definition, read, answer, series, points, kept, rate) {
  const suits = read.query.fn ? kind("") : kind(definition.kind);
  const single = definition.kind === "histogram" && series.length === 1; // its quantiles are drawn
  const columns = suits.columns.map((it) => {
    const line = single ? QUANTILES.findIndex((q) => it === `p${q * 100}`) : -1;
    return line < 0 ? it : h("span", {}, dot(color(line)), it);
  });
  const heads = read.query.fn ? ["per second"] : [...columns, ...(rate ? ["per second"] : [])];
  const newest = (i) => (read.windowed ? points[i].at(-1)?.[1] : series[i].value);
  const rows = series.slice(0, ROWS_MAX).map((it, i) => {
    const value = newest(i);
    const mark = kept.includes(i) && definition.kind !== "topk" && !single;
    const swatch = mark ? dot(color(kept.indexOf(i))) : null;
    const names = Object.values(it.labels);
    const first = h("span", {}, swatch, names[0] ?? "all");
    return [first, ...names.slice(1), ...(value === undefined || value === null ? heads.map(() => "") : [...suits.cells(value), ...(rate ? [rates(points[i]).at(-1)?.[1]] : [])].map(shown))];
  });
  const labels = Object.keys(series[0]?.labels ?? {});
  const newestMs = Math.max(...points.map((it) => it.at(-1)?.[0] ?? 0));
  const over = newestMs + answer.over_ms <= answer.final_before_ms;
  const caption = `${shown(answer.truncated ? answer.series_total : series.length)} series${rows.length < series.length || answer.truncated
    ? `, the first ${rows.length} shown` : ""}${read.windowed ? `; the newest of steps of ${read.query.step} s${over ? "" : ", which is not over yet"}` : ""}`;
  const width = Math.max(1, labels.length);
  return table(caption, [...(labels.length ? labels : ["series"]), ...heads], rows, new Set(heads.map((_, i) => i + width)));
}

function dot(fill) {
  const it = h("span", { class: "swatch", "aria-hidden": "true" });
  it.style.background = fill;
  return it;
}

/** Saves the answer to a read as a file, or shows in `unsaved` why there is none. */
async function downloadCsv(event, name, query, unsaved) {
  event.preventDefault();
  try {
    const answer = await send(path(name, query), { headers: { Accept: "text/csv" } });
    if (!answer.ok) throw new Error(await reason(answer));
    const link = h("a", { href: URL.createObjectURL(await answer.blob()), download: `${name}.csv` });
    link.click();
    URL.revokeObjectURL(link.href);
    unsaved.replaceChildren();
  } catch (error) {
    unsaved.replaceChildren(problem(`Nothing was saved: ${error.message}`));
  }
}

function copyLines(definition, read, state) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const address = `${location.origin}${location.pathname}${path(definition.name, { ...read.query, q: [], limit: null })}`;
  const options = [...read.query.where.map((it) => `--where ${quoted(it)}`), ...read.by.map((it) => `--by ${quoted(it)}`),
    ...(read.by.length ? [] : ["--total"]), ...(read.windowed ? [...rangeOf(read), `--step ${read.query.step}s`] : []),
    ...(read.query.fn ? [`--fn ${read.query.fn}`] : [])];
  return h("div", { class: "panel copy" }, [["Link", location.href], ["curl", `curl -sf ${token() ? '-H "Authorization: Bearer $PIPELINE_TOKEN" ' : ""}${quoted(address)}`],
    ["Shell", `pipeline get ${quoted(definition.name)} --from ${location.origin} ${options.join(" ")}`],
    ["PromQL", promql(definition, read)]].flatMap(([name, text]) => [h("span", { class: "soft" }, name), h("pre", {}, text),
    h("button", { type: "button", "aria-label": `Copy ${name}`, onclick: () => navigator.clipboard.writeText(text) }, "Copy")]));
}

/** Returns the options of `pipeline get` for what the read covers. */
function rangeOf({ query, span }) {
  if (!query.start) return [`--last ${span}s`];
  return [`--start ${query.start}`, ...(query.end ? [`--end ${query.end}`] : [])];
}

/** Returns the expression for what `GET /v1/openmetrics` exposes of the view. */
function promql(definition, read) {
  const by = read.by.length ? ` by (${read.by.join(", ")})` : "";
  const where = read.query.where.map((it) => it.replace(/^([a-zA-Z_][a-zA-Z0-9_]*)(=~|!~|!=|=)(.*)$/s, (_, label, op, value) =>
    `${label}${op}${JSON.stringify(value)}`)).join(", ");
  const series = (name) => `${name}${where ? `{${where}}` : ""}`;
  const { name, kind: of, monotone } = definition;
  if (of === "histogram") return `histogram_quantile(0.95, sum by (${["le", ...read.by].join(", ")}) (${series(`${name}_bucket`)}))`;
  if (of === "sum" && monotone && !read.windowed) return `sum${by} (rate(${series(name.endsWith("_total") ? name : `${name}_total`)}[1m]))`;
  return `${{ min: "min", max: "max", mean: "avg" }[of] ?? "sum"}${by} (${series(name)})`;
}
