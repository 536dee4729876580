/** Starts the page: the part of the address behind # says which page is shown, so that a link shows the same. */

import { showStatus } from "./status.js";
import { showView } from "./view.js";
import { showViews } from "./views.js";

const main = document.getElementById("main");
let close = () => {};

function show() {
  close();
  const [place, parameters = ""] = location.hash.replace(/^#/, "").split("?");
  const [, page = "", name = ""] = place.split("/");
  for (const link of document.querySelectorAll("nav a")) {
    if (link.getAttribute("href") === (page === "status" ? "#/status" : "#/")) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = page === "view" ? `${decodeURIComponent(name)} · pipeline` : "pipeline";
  if (page === "view") close = showView(main, decodeURIComponent(name), new URLSearchParams(parameters), (next) => { location.hash = `${place}?${next}`; });
  else close = page === "status" ? showStatus(main) : showViews(main);
}

window.addEventListener("hashchange", show);
window.addEventListener("access", show); // another token sees other views
show();
