/** The page of all views: kind, labels, series, total, rate and a sparkline of each. */

import { fetchJson, path } from "./api.js";
import { sparkline } from "./chart.js";
import { h, problem, shown, table } from "./dom.js";
import { described, drawn } from "./kinds.js";

const SHOWN_MAX = 40;
const SAMPLES_MAX = 60;
const EVERY_MS = 2_000;

export function showViews(main) {
  const stop = new AbortController();
  const samples = new Map(); // by view: [time, number or null] of its total
  const filter = h("input", { id: "filter", type: "search", autocomplete: "off", oninput: () => draw() });
  const place = h("div");
  let views = [];
  main.replaceChildren(h("h1", {}, "Views"), h("form", { class: "panel", role: "search", onsubmit: (event) => event.preventDefault() },
    h("label", { for: "filter" }, "Name contains", filter)), place);

  function listed() {
    return views.filter((it) => it.answers && it.name.includes(filter.value)).slice(0, SHOWN_MAX);
  }

  async function sample(view) {
    const window = view.window_s === null ? {} : { at: Date.now() };
    const answer = await fetchJson(path(view.name, { by: "", kind: view.kind, ...window }), undefined, stop.signal);
    const [series] = answer.series;
    const value = series === undefined ? null : series.value !== undefined ? series.value : series.points?.at(-1)?.[1];
    const kept = samples.get(view.name) ?? [];
    kept.push([Date.now(), drawn(view.kind, value), value]);
    samples.set(view.name, kept.slice(-SAMPLES_MAX));
  }

  async function update() {
    try {
      views = (await fetchJson("v1/views", undefined, stop.signal)).views;
      await Promise.allSettled(listed().map(sample));
      draw();
    } catch (error) {
      if (!stop.signal.aborted && !views.length) place.replaceChildren(problem(error.message));
    }
    if (!stop.signal.aborted) setTimeout(update, EVERY_MS);
  }

  function draw() {
    const shownViews = listed();
    if (!views.length) {
      place.replaceChildren(h("p", {}, "No view yet. Publish a delta:"), h("div", { class: "panel" }, h("pre", {},
        `curl -sf ${location.origin}/v1/deltas --json '[{"view": "signups", "kind": "sum", "labels": {"plan": "pro"}, "value": 1}]'`)));
      return;
    }
    const rows = shownViews.map((view) => {
      const kept = samples.get(view.name) ?? [];
      return [h("a", { href: `#/view/${encodeURIComponent(view.name)}` }, view.name),
        described(view), totalOf(view, kept), rateOf(view, kept),
        sparkline(lineOf(view, kept), `${view.name}, last ${Math.round((kept.length * EVERY_MS) / 1000)} s`),
        view.labels.join(", "), shown(view.series_count)];
    });
    const more = views.filter((it) => it.answers).length - rows.length;
    place.replaceChildren(table(`${rows.length} views${more > 0 ? `, ${more} more that the filter leaves out` : ""}`,
      ["view", "kind", "now", "per second", "since this page is open", "labels", "series"], rows, new Set([2, 3, 6])));
  }

  update();
  return () => stop.abort();
}

function totalOf(view, kept) {
  const value = kept.at(-1)?.[2];
  if (value === undefined || value === null) return "";
  return typeof value === "object" ? `${view.kind === "histogram" ? "p50 " : ""}${shown(drawn(view.kind, value))}` : shown(value);
}

function changes(kept) {
  return kept.slice(1).map((it, i) => (
    it[1] === null || kept[i][1] === null ? null : ((it[1] - kept[i][1]) / (it[0] - kept[i][0])) * 1000));
}

function rises(view) {
  return view.window_s === null && ((view.kind === "sum" && view.monotone) || view.kind === "topk");
}

function rateOf(view, kept) {
  if (!rises(view)) return "";
  const rates = changes(kept.slice(-6)).filter((it) => it !== null && it >= 0);
  return rates.length ? shown(rates.reduce((a, b) => a + b, 0) / rates.length) : "";
}

function lineOf(view, kept) {
  return rises(view) ? changes(kept) : kept.map((it) => it[1]);
}
