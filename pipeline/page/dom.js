/** Makes elements. Texts become text nodes, so that no label or value is ever markup. */

export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  set(element, attributes);
  element.append(...children.flat().filter((it) => it !== null && it !== undefined));
  return element;
}

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  set(element, attributes);
  element.append(...children);
  return element;
}

function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
}

/** Returns a table; `numeric` holds the indexes of columns of numbers. Cells are texts or elements. */
export function table(caption, heads, rows, numeric = new Set()) {
  const cell = (tag, content, i, extra) => h(tag, { class: numeric.has(i) ? "number" : null, ...extra }, content);
  return h("div", { class: "wide", tabindex: "0", role: "region", "aria-label": caption },
    h("table", {},
      h("caption", {}, caption),
      h("thead", {}, h("tr", {}, heads.map((it, i) => cell("th", it, i, { scope: "col" })))),
      h("tbody", {}, rows.map((row) => h("tr", {}, row.map((it, i) => cell("td", it, i, {})))))));
}

export function problem(text) {
  return h("p", { class: "problem", role: "alert" }, text);
}

const short = new Intl.NumberFormat("en", { maximumSignificantDigits: 5 });

/** Returns a value as text: numbers with at most five significant digits beyond integers, nothing for null. */
export function shown(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "bigint") return value.toLocaleString("en");
  if (typeof value === "number") return Number.isInteger(value) ? value.toLocaleString("en") : short.format(value);
  return typeof value === "object" ? JSON.stringify(value, (_, it) => (typeof it === "bigint" ? String(it) : it)) : String(value);
}

export function duration(ms) {
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 120_000) return `${(ms / 1000).toFixed(1)} s`;
  if (ms < 7_200_000) return `${Math.round(ms / 60_000)} min`;
  return `${Math.round(ms / 3_600_000)} h`;
}
