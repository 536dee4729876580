/** Talks to the server: single answers, streams of answers, and the badge that says how stale they are. */

import { send } from "./access.js";

const badge = document.getElementById("staleness");
const LATE_MS = 4_000; // a stream without news has an event every 2 to 3 s (`stream_heartbeat_ms`)
const BAD_MS = 10_000;
const RETRY_MS = 2_000;
const SILENCE_MS = 15_000; // of a stream
const AWAY = "the server does not answer";
let newest = null; // staleness_ms of the newest answer, and when it came
let refusal = "";

/** Notes an answer's bound on staleness, which grows from now until the next answer. */
function note(asOf) {
  refusal = "";
  newest = { staleness: asOf.staleness_ms, at: performance.now() };
  showStaleness();
}

function showStaleness() {
  let text = "not connected", level = "bad";
  if (newest !== null) {
    const since = performance.now() - newest.at;
    const staleness = newest.staleness === null ? null : newest.staleness + since;
    if (staleness === null) text = "staleness unknown";
    else {
      text = `at most ${staleness < 1000 ? "1 s" : spell(staleness)} stale`;
      level = staleness < LATE_MS ? "good" : staleness < BAD_MS ? "late" : "bad";
    }
    if (since > BAD_MS) text += `, no answer for ${spell(since)}`;
  }
  if (refusal) {
    text = newest === null ? refusal : `${refusal}; ${text}`;
    level = "bad";
  }
  badge.textContent = text;
  badge.className = `badge ${level}`;
}

function spell(ms) {
  return ms < 120_000 ? `${Math.ceil(ms / 1000)} s` : `${Math.ceil(ms / 60_000)} min`;
}

setInterval(showStaleness, 500);

/** Parses JSON; ints beyond 2^53 become BigInts, with all their digits. */
export function parse(text) {
  return JSON.parse(text, (_, value, context) => (
    typeof value === "number" && Number.isInteger(value) && !Number.isSafeInteger(value) && /^-?\d+$/.test(context?.source ?? "")
      ? BigInt(context.source) : value));
}

/** Returns why a request has failed, in the server's words. */
export async function reason(response) {
  try {
    const { detail, title } = parse(await response.text());
    const words = detail || title || `HTTP ${response.status}`;
    return response.status === 403 ? `Not allowed (403): ${words}` : words;
  } catch {
    return `HTTP ${response.status}`;
  }
}

/**
 * Returns the answer to a GET or, with a body, to a POST. Throws an error with the server's words.
 * With `noted` false the badge stays as it is: the page shows numbers of another request.
 */
export async function fetchJson(path, body, signal, noted = true) {
  let response;
  try {
    response = await send(path, body === undefined
      ? { signal }
      : { signal, method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (noted) refusal = error.words ?? AWAY;
    showStaleness();
    throw error.words ? error : new Error(AWAY);
  }
  if (!response.ok) {
    if (noted && response.status === 503) refusal = "the server is not ready";
    showStaleness();
    throw new Error(await reason(response));
  }
  const text = await response.text();
  let answer;
  try {
    answer = parse(text);
  } catch {
    throw new Error("not an answer of this API");
  }
  if (noted && answer.as_of) note(answer.as_of);
  return answer;
}

/** Returns the path of a read. `query` has arrays for parameters that can be repeated. */
export function path(view, query, end = "") {
  const parameters = new URLSearchParams();
  for (const [name, value] of Object.entries(query)) {
    for (const it of Array.isArray(value) ? value : [value]) {
      if (it !== null && it !== undefined && (it !== "" || name === "by")) parameters.append(name, it);
    }
  }
  const text = parameters.toString();
  return `v1/views/${encodeURIComponent(view)}${end}${text ? `?${text}` : ""}`;
}

/** Watches a read: calls `onAnswer` with the whole answer after each event, and `onProblem` with a text. Returns a stop. */
export function watch(view, query, onAnswer, onProblem) {
  const stop = new AbortController();
  let answer = null, lastId = "";

  async function run() {
    while (!stop.signal.aborted) {
      try {
        await follow();
      } catch (error) {
        if (stop.signal.aborted) return;
        if (error.words) onProblem(error.words);
      }
      refusal = "connection lost";
      showStaleness();
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }

  /** Takes the events of one connection, until it is lost or silent for too long. */
  async function follow() {
    const silence = new AbortController();
    let silentMs = SILENCE_MS;
    let timer = setTimeout(() => silence.abort(), silentMs);
    try {
      const response = await send(path(view, query, "/stream"), { signal: AbortSignal.any([stop.signal, silence.signal]),
        headers: { Accept: "text/event-stream", ...(lastId && { "Last-Event-ID": lastId }) } });
      if (!response.ok) throw Object.assign(new Error(), { words: await reason(response) });
      silentMs = Math.max(SILENCE_MS, 3 * Number(response.headers.get("Pipeline-Heartbeat-Ms")));
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) return;
        clearTimeout(timer);
        timer = setTimeout(() => silence.abort(), silentMs);
        text += value;
        if (!value.includes("\n\n") && !value.startsWith("\n")) continue; // a part of a long event
        const events = text.split("\n\n");
        text = events.pop();
        events.forEach(take);
      }
    } finally {
      clearTimeout(timer);
    }
  }

  function take(event) {
    if (stop.signal.aborted) return;
    const fields = Object.fromEntries(event.split("\n").map((line) => line.split(/: ?(.*)/s, 2)));
    if (fields.data === undefined) return; // a comment
    const content = parse(fields.data);
    if (fields.event === "problem") {
      onProblem(content.detail || content.title);
      return;
    }
    lastId = fields.id ?? lastId;
    const next = fields.event === "answer" ? content : updated(answer, content);
    if (next === null) return;
    answer = next;
    note(answer.as_of);
    onAnswer(answer);
  }

  run();
  return () => stop.abort();
}

export function key(labels) {
  return JSON.stringify(Object.values(labels));
}

/** Returns an answer as an update of its stream makes it (`pipeline/core/updates.py`). */
export function updated(answer, update) {
  if (answer === null) return null; // an update of an answer that this page has not seen
  const head = update.answer;
  const series = new Map(answer.series.map((it) => [key(it.labels), it]));
  for (const labels of update.gone ?? []) series.delete(key(labels));
  for (const it of update.changed ?? []) {
    const known = series.get(key(it.labels));
    if (head.start_ms !== undefined && known?.points) {
      const points = new Map([...known.points, ...(it.points ?? [])].map((point) => [point[0], point]));
      it.points = [...points.values()].sort((a, b) => a[0] - b[0]);
    }
    series.set(key(it.labels), it);
  }
  if (head.start_ms !== undefined) {
    const first = head.start_ms + head.step_ms - head.over_ms;
    for (const it of series.values()) it.points = (it.points ?? []).filter((point) => point[0] >= first);
  }
  const keys = update.order ? update.order.map(key) : [...series.keys()].sort(byLabels(series));
  return { ...head, series: keys.map((it) => series.get(it)) };
}

function byLabels(series) {
  const values = new Map([...series].map(([name, it]) => [name, Object.values(it.labels)]));
  return (a, b) => {
    const [x, y] = [values.get(a), values.get(b)];
    for (let i = 0; i < x.length; i += 1) if (x[i] !== y[i]) return x[i] < y[i] ? -1 : 1;
    return 0;
  };
}
