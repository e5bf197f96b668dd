// The page: its three views, and which one is shown.

import { site } from "./models.js";
import { at, say } from "./page.js";
import * as search from "./search.js";
import * as watch from "./watch.js";

const tabs = [...document.querySelectorAll("[role=tab]")];

function show(tab) {
  const { view } = tab.dataset;
  for (const one of tabs) {
    one.setAttribute("aria-selected", one === tab);
    one.tabIndex = one === tab ? 0 : -1;
  }
  at("search").hidden = view !== "search";
  at("watch").hidden = view === "search";
  at("watch").setAttribute("aria-labelledby", view === "search" ? "tab-classify" : tab.id);
  watch.show(view === "search" ? null : view);
}

/** Arrows, Home and End move between tabs, as in every list of tabs. */
function move(event) {
  const open = tabs.filter(({ disabled }) => !disabled);
  const now = open.indexOf(event.target);
  const to = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: -1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  const tab = open.at(to % open.length);
  tab.focus();
  show(tab);
}

/** Close a view that these models cannot fill, and say why. */
function close(view, reason) {
  const tab = tabs.find((one) => one.dataset.view === view);
  tab.disabled = true;
  tab.title = reason;
}

window.onunhandledrejection = ({ reason }) => say(reason.message, true);
at("title").textContent = site.title;
document.title = `${site.title} · clipress demo`;
if (site.models.length < 2) close("compare", "Comparing takes two models.");
if (!site.models.some(({ text }) => text)) close("search", "Searching by words takes a model that reads texts.");
for (const tab of tabs) {
  tab.onclick = () => show(tab);
  tab.onkeydown = move;
}
watch.begin();
search.begin();
show(tabs[0]);
