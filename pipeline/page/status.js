/** The page of the server's state: partitions, restores, members, dead letters, definitions that differ. */

import { fetchJson } from "./api.js";
import { duration, h, problem, shown, table } from "./dom.js";

const EVERY_MS = 2_000;
const LETTERS_SHOWN_MAX = 20;

export function showStatus(main) {
  const stop = new AbortController();
  const place = h("div");
  main.replaceChildren(h("h1", {}, "Status"), place);

  async function update() {
    const ask = (name) => fetchJson(name, undefined, stop.signal).catch((error) => error);
    const [status, views, letters, metrics] = await Promise.all([
      ask("v1/status"), ask("v1/views"), ask(`v1/dead-letters?limit=${LETTERS_SHOWN_MAX}`),
      fetch("metrics", { signal: stop.signal }).then((it) => it.text()).catch(() => "")]);
    if (stop.signal.aborted) return;
    place.replaceChildren(...(status instanceof Error ? [problem(status.message)] : partitions(status)),
      ...deadLetters(letters), ...(views instanceof Error ? [] : definitions(views.views)), ...limits(metrics));
    setTimeout(update, EVERY_MS);
  }

  update();
  return () => stop.abort();
}

function partitions(status) {
  const rows = status.partitions.map((it) => [String(it.partition), it.phase, shown(it.next_offset), shown(it.end_offset), shown(it.lag),
    staleness(it.staleness_ms), it.committed_at_ms ? new Date(it.committed_at_ms).toLocaleTimeString() : "", restore(it.restore)]);
  const found = [h("p", { class: status.ready ? "good" : "bad" }, status.ready ? "Ready: every partition can be read." :
    "Not ready: some partitions can't be read yet."),
  table(`${status.partition_count} partitions`, ["partition", "phase", "next offset", "end of the log", "lag", "staleness", "last commit", "restore"],
    rows, new Set([2, 3, 4, 5]))];
  if (status.members) {
    found.push(h("h2", {}, "Workers"), table("Members of the group", ["name", "URL", "partitions", "standbys"],
      status.members.map((it) => [it.name, it.url, it.partitions.join(", "), (it.standbys ?? []).join(", ")])));
  }
  return found;
}

function staleness(ms) {
  return h("span", { class: ms === null || ms === undefined || ms >= 10_000 ? "bad" : ms >= 2_000 ? "late" : "good" },
    ms === null || ms === undefined ? "unknown" : duration(ms));
}

function restore(it) {
  if (!it) return "";
  if (it.waiting) return `waits: ${it.waiting}`;
  return `${shown(it.remaining)} records to go, about ${duration(it.seconds_left * 1000)}`;
}

function deadLetters(letters) {
  const head = h("h2", {}, "Dead letters");
  if (letters instanceof Error) return [head, h("p", { class: "soft" }, `This server does not show them: ${letters.message}`)];
  if (!letters.letter_count) return [head, h("p", { class: "good" }, "None.")];
  return [head, table(`${shown(letters.letter_count)} records or groups that could not be folded; pipeline dead-letters shows and replays them`,
    ["partition", "offset", "reason"], letters.letters.map((it) => [shown(it.partition), shown(it.offset), it.reason ?? ""]), new Set([0, 1]))];
}

function definitions(views) {
  const byName = Map.groupBy(views, (it) => it.name);
  const differing = [...byName].filter(([, them]) => them.length > 1);
  if (!differing.length) return [];
  return [h("h2", {}, "Views with several definitions"), table("Apps that do not agree; reads choose one kind and window, and merge labels",
    ["view", "kind", "labels", "window", "series"], differing.flatMap(([name, them]) => them.map((it) => [name, it.kind, it.labels.join(", "),
      it.window_s === null ? "" : `${it.window_s} s`, shown(it.series_count)])), new Set([4]))];
}

function limits(metrics) {
  const found = [...metrics.matchAll(/^pipeline_series_overflowed_total\{[^}]*\} (.+)$/gm)].reduce((sum, it) => sum + Number(it[1]), 0);
  if (!found) return [];
  return [h("h2", {}, "Limits"), h("p", { class: "late" },
    `${shown(found)} entries were merged into overflow series: a view is at series_max. Use fewer labels, or raise the setting.`)];
}
