/** The access token: asked for when the server wants one, and kept until the tab is closed. */

import { h } from "./dom.js";

const KEPT = "pipeline-token";
const TOKEN = /^[A-Za-z0-9._~+/=-]{1,1024}$/;
const place = document.getElementById("access");
const change = document.getElementById("change-token");
const why = h("p", { role: "alert" });
const field = h("input", { id: "token", type: "password", autocomplete: "off", spellcheck: "false", size: 40 });
const form = h("form", { class: "panel", onsubmit: keep }, why, h("label", { for: "token" }, "Access token", field),
  h("button", { type: "submit" }, "Use"), h("button", { type: "button", onclick: forget }, "Forget"),
  h("p", { class: "soft" }, "It is kept in this tab only, until the tab is closed. pipeline tokens add makes one."));
let refused = null; // the token, or "" for none, that the server does not take
let words = ""; // why not

export function token() {
  return sessionStorage.getItem(KEPT) ?? "";
}

/** Fetches with the access token. A server that wants another one is not asked again before there is one. */
export async function send(address, options = {}) {
  const given = token();
  if (given === refused) throw Object.assign(new Error(words), { words });
  const headers = { ...options.headers, ...(given && { Authorization: `Bearer ${given}` }) };
  const response = await fetch(address, { ...options, headers });
  if (response.status === 401 && given === token()) {
    const { detail } = await response.clone().json().catch(() => ({}));
    refused = given;
    words = given ? `The server does not take this access token (401): ${detail}` : "This server needs an access token (401).";
    ask(words);
  }
  return response;
}

function ask(text) {
  why.textContent = text;
  if (form.isConnected) return;
  place.replaceChildren(form);
  field.focus();
}

function keep(event) {
  event.preventDefault();
  const given = field.value.trim();
  if (!TOKEN.test(given)) {
    ask("This is no access token: it would have letters, digits and - . _ ~ + / = only.");
    return;
  }
  sessionStorage.setItem(KEPT, given);
  done();
}

function forget() {
  sessionStorage.removeItem(KEPT);
  done();
}

function done() {
  field.value = "";
  refused = null;
  place.replaceChildren();
  change.hidden = !token();
  window.dispatchEvent(new Event("access"));
}

change.hidden = !token();
change.addEventListener("click", () => ask("Another access token:"));
