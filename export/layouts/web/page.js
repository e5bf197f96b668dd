// What several views do to the page.

import { site } from "./models.js";

export const at = (id) => document.getElementById(id);

/** Say something to everybody; what went wrong stays until the next word. */
export function say(text, isWrong = false) {
  at("status").textContent = text;
  at("status").classList.toggle("wrong", isWrong);
}

export const megabytes = ({ bytes }) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;

/** Fill a list of models, and choose one. */
export function offer(select, chosen, models = site.models) {
  select.replaceChildren(...models.map((one) => new Option(`${one.name} · ${one.precision} · ${megabytes(one)}`, one.name)));
  select.value = chosen;
}
