// Classify and compare: one model, or two on the same frame.

import { Camera } from "./camera.js";
import { openModel, probabilities, see, site } from "./models.js";
import { at, megabytes, offer, say } from "./page.js";

const SHOWN = 8; // labels
const SPOKEN_EVERY = 3000; // milliseconds, so that a screen reader can follow
const PAUSE = 1000; // A longer one between two frames was no frame's fault.

const camera = new Camera(at("video"));
let still = null;
let cards = [];
let active = true;
let isLooking = false;
let wanted = false;

class Card {
  constructor(chosen) {
    this.node = at("answer").content.cloneNode(true).firstElementChild;
    this.select = this.node.querySelector("select");
    offer(this.select, chosen);
    this.select.onchange = look;
    this.times = [];
  }

  async model() {
    const model = await openModel(this.select.value);
    this.node.querySelector(".note").textContent = `${model.place}, ${model.precision}, ${megabytes(model)}`;
    return model;
  }

  show(names, values, { run, prepare }) {
    const order = values.map((_, i) => i).sort((a, b) => values[b] - values[a]).slice(0, SHOWN);
    const list = this.node.querySelector("ol");
    while (list.children.length > order.length) list.lastChild.remove();
    order.forEach((place, i) => {
      const row = list.children[i] ?? list.appendChild(newRow());
      row.dataset.label = names[place];
      row.dataset.probability = values[place];
      row.style.setProperty("--share", values[place]);
      row.children[0].textContent = names[place];
      row.children[1].textContent = `${(100 * values[place]).toFixed(1)} %`;
    });
    this.figure("run", `${run.toFixed(1)} ms`);
    this.figure("prepare", `${prepare.toFixed(1)} ms`);
    this.figure("rate", camera.isOn ? this.rate(performance.now()) : "–");
    return names[order[0]];
  }

  rate(now) {
    if (now - this.times.at(-1) > PAUSE) this.times = [];
    this.times = [...this.times, now].slice(-30);
    const seconds = (now - this.times[0]) / 1000;
    return seconds > 0 ? `${((this.times.length - 1) / seconds).toFixed(1)} / s` : "–";
  }

  figure(name, text) {
    this.node.querySelector(`[data-figure="${name}"]`).textContent = text;
  }
}

function newRow() {
  const row = document.createElement("li");
  row.append(document.createElement("span"), document.createElement("span"));
  return row;
}

/** Show one model, or two; `null` rests. */
export function show(view) {
  active = view !== null;
  if (!active) return;
  const names = view === "compare" ? [site.compared, cards[0]?.select.value ?? site.chosen] : [cards.at(-1)?.select.value ?? site.chosen];
  cards = names.map((name) => new Card(name));
  at("answers").replaceChildren(...cards.map(({ node }) => node));
  look();
}

/** Look at the image, or at the camera for as long as it is on; what was shown before is done again. */
export async function look() {
  wanted = true;
  if (isLooking) return;
  isLooking = true;
  try {
    while (active && (wanted || camera.isOn)) {
      wanted = false;
      await lookOnce();
    }
  } catch (error) {
    stopCamera();
    say(error.message, true);
  }
  isLooking = false;
}

async function lookOnce() {
  const shown = cards;
  const models = await Promise.all(shown.map((card) => card.model()));
  at("apart-label").hidden = models.every(({ logit_bias }) => logit_bias === null);
  at("asked").hidden = models.every(({ labels }) => labels !== null);
  say(models.map(({ name, seconds }) => `${name} was ready after ${seconds.toFixed(1)} s.`).join(" "));
  const given = asked();
  const image = camera.isOn ? await camera.frame() : still;
  if (!image) return;
  if (!given.labels.length) return say("Type at least one label.", true);
  const found = await see(models, image);
  const best = [];
  for (const [i, model] of models.entries()) {
    const values = await probabilities(model, found[i].row, given);
    best.push(shown[i].show(model.labels ?? given.labels, values, found[i]));
  }
  speak(best);
}

/** Return what the user typed: labels without repetitions, and the prompt. */
function asked() {
  const labels = at("labels").value.split(/[\n,]/).map((label) => label.trim()).filter(Boolean);
  const template = at("template").value;
  return {
    labels: [...new Set(labels)],
    template: template.includes("{}") ? template : `${template} {}`.trim(),
    apart: !at("apart-label").hidden && at("apart").checked,
  };
}

let spoken = { at: 0, text: "" };
function speak(best) {
  const text = best.join(", ");
  const now = performance.now();
  if (text === spoken.text || now - spoken.at < SPOKEN_EVERY) return;
  spoken = { at: now, text };
  at("spoken").textContent = text;
}

async function startCamera() {
  at("camera").disabled = true;
  try {
    await camera.start();
    at("camera").textContent = "Stop camera";
    frame("video");
    look();
  } catch (error) {
    stopCamera();
    say(error.message, true);
  }
  at("camera").disabled = false;
}

function stopCamera() {
  camera.stop();
  at("camera").textContent = "Start camera";
  frame(still ? "still" : "empty");
}

function frame(shown) {
  for (const id of ["video", "still", "empty"]) at(id).hidden = id !== shown;
}

export function begin() {
  at("labels").value = site.labels.join("\n");
  at("template").value = site.template;
  at("apart").checked = true; // as SigLIP was trained
  at("asked").oninput = look;
  at("asked").onsubmit = (event) => event.preventDefault();
  at("camera").onclick = () => (camera.isOn ? stopCamera() : startCamera());
  at("file").onchange = ({ target }) => {
    if (!target.files.length) return;
    if (still) URL.revokeObjectURL(at("still").src);
    [still] = target.files;
    at("still").src = URL.createObjectURL(still);
    stopCamera();
    look();
  };
  // Who has allowed the camera before is not asked to press a button.
  navigator.permissions?.query({ name: "camera" }).then(({ state }) => state === "granted" && startCamera(), () => {});
}
