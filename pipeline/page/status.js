/** The page of the server's state: partitions, restores, limits, dead letters, definitions that differ. */

import { send } from "./access.js";
import { fetchJson } from "./api.js";
import { duration, h, problem, shown, table } from "./dom.js";

const EVERY_MS = 2_000;
const LETTERS_EVERY_MS = 10_000; // to list them the server reads all
const LETTERS_SHOWN_MAX = 20;
const NEAR = 0.8; // of a limit

export function showStatus(main) {
  const stop = new AbortController();
  const place = h("div");
  let letters = null, lettersAt = 0;
  main.replaceChildren(h("h1", {}, "Status"), place);

  async function update() {
    const ask = (name) => fetchJson(name, undefined, stop.signal).catch((error) => error);
    const old = letters === null || Date.now() - lettersAt >= LETTERS_EVERY_MS;
    if (old) lettersAt = Date.now();
    const [status, views, metrics] = await Promise.all([
      ask("v1/status"), ask("v1/views"),
      send("metrics", { signal: stop.signal }).then((it) => it.text()).catch(() => "")]);
    if (old) letters = await ask(`v1/dead-letters?limit=${LETTERS_SHOWN_MAX}`);
    if (stop.signal.aborted) return;
    const known = views instanceof Error ? [] : views.views;
    place.replaceChildren(...(status instanceof Error ? [problem(status.message)] : partitions(status)),
      ...limits(known, status.series_max, metrics), ...deadLetters(letters), ...definitions(known));
    setTimeout(update, EVERY_MS);
  }

  update();
  return () => stop.abort();
}

function partitions(status) {
  const own = status.role === undefined; // one process folds all partitions and answers
  const rows = status.partitions.map((it) => [String(it.partition), it.phase, shown(it.lag), staleness(it.staleness_ms),
    own ? "this process" : it.owner ?? "", it.committed_at_ms ? moment(it.committed_at_ms) : "", restore(it.restore),
    shown(it.next_offset), shown(it.end_offset)]);
  const waiting = status.partitions.filter((it) => it.restore).length;
  const found = [h("p", { class: status.ready ? "good" : "bad" }, status.ready ? "Ready: every partition can be read." :
    `Not ready: ${waiting ? `${waiting} of ${status.partition_count} partitions being restored` : "some partitions can't be read yet"}. `
    + "Views are shown as soon as they can be read."),
  table(`${status.partition_count} partitions`,
    ["partition", "phase", "lag", "staleness", own ? "folded by" : "last commit by", "last commit", "restore", "next offset", "end of the log"],
    rows, new Set([2, 3, 7, 8]))];
  if (!own) {
    found.push(h("p", { class: "soft" }, "pipeline status --from kafka://BROKER shows all workers, their partitions and standbys."));
  }
  return found;
}

/** Returns a time of today as such, an earlier one with its date. */
function moment(ms) {
  const at = new Date(ms);
  return at.toDateString() === new Date().toDateString() ? at.toLocaleTimeString() : at.toLocaleString();
}

function staleness(ms) {
  return h("span", { class: ms === null || ms === undefined || ms >= 10_000 ? "bad" : ms >= 2_000 ? "late" : "good" },
    ms === null || ms === undefined ? "unknown" : duration(ms));
}

function restore(it) {
  if (!it) return "";
  if (it.waiting) return `waits: ${it.waiting}`;
  return [h("progress", { max: it.entries + it.remaining, value: it.entries, "aria-label": "restored" }),
    ` ${shown(it.remaining)} records to go, about ${duration(it.seconds_left * 1000)}`];
}

function deadLetters(letters) {
  const head = h("h2", {}, "Dead letters");
  if (letters instanceof Error) return [head, h("p", { class: "soft" }, `This server does not show them: ${letters.message}`)];
  if (!letters.letter_count) return [head, h("p", { class: "good" }, "None.")];
  return [head, table(`${shown(letters.letter_count)} records or groups that could not be folded, the oldest first; pipeline dead-letters shows and replays them`,
    ["accepted", "view", "reason", "series", "partition", "offset"], letters.letters.map((it) => [moment(it.at_ms), it.view,
      h("div", { class: "reason" }, it.reason), shown(it.series_count), shown(it.partition), shown(it.offset)]), new Set([3, 4, 5]))];
}

function definitions(views) {
  const byName = Map.groupBy(views, (it) => it.name);
  const differing = [...byName].filter(([, them]) => them.length > 1);
  if (!differing.length) return [];
  return [h("h2", {}, "Views with several definitions"), table("Apps that do not agree; reads choose one kind and window, and merge labels",
    ["view", "kind", "labels", "window", "series"], differing.flatMap(([name, them]) => them.map((it) => [name, it.kind, it.labels.join(", "),
      it.window_s === null ? "" : `${it.window_s} s`, shown(it.series_count)])), new Set([4]))];
}

/** Shows definitions that have almost as many series in one partition as `series_max` allows, and what was merged beyond it. */
function limits(views, limit, metrics) {
  const near = limit ? views.filter((it) => it.labels.length && it.series_count_max >= NEAR * limit) : [];
  const merged = [...metrics.matchAll(/^pipeline_series_overflowed_total\{[^}]*\} (.+)$/gm)].reduce((sum, it) => sum + Number(it[1]), 0);
  if (!near.length && !merged) return [];
  return [h("h2", {}, "Limits"),
    merged ? h("p", { class: "bad" }, `${shown(merged)} entries were merged into the series whose labels are all __overflow__.`) : null,
    h("p", { class: "late" }, "Beyond series_max, new series of a view merge into one. Use fewer labels or values of them, expire series "
      + "(retention_s), or raise the setting of the workers."),
    near.length ? table(`Definitions with ${NEAR * 100} % of series_max or more in their fullest partition`,
      ["view", "kind", "labels", "series in one partition", "series_max", "full"], near.map((it) => [it.name, it.kind, it.labels.join(", "),
        shown(it.series_count_max), shown(limit), h("span", { class: it.series_count_max >= limit ? "bad" : "late" },
          `${Math.min(100, Math.floor((100 * it.series_count_max) / limit))} %`)]), new Set([3, 4, 5])) : null].filter((it) => it !== null);
}
