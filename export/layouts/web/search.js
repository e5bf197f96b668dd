// Search: a folder of images, by words, as they are typed.

import { dot, openModel, read, see, site } from "./models.js";
import { at, offer, say } from "./page.js";

const SHOWN = 48; // images
const SHOW_EVERY = 500; // milliseconds, while images are still being read
const IMAGE = /\.(jpe?g|png|webp|gif|bmp|avif)$/i;

let files = [];
let items = []; // {file, row}, as far as they have been read
let pass = 0; // Of reading a folder; one that is under way ends when another begins.
const urls = new Map();

/** Read all images of the folder with the chosen model. */
async function readFolder() {
  const mine = ++pass;
  const bar = at("progress").querySelector("progress");
  const broken = [];
  items = [];
  bar.hidden = false;
  try {
    const model = await openModel(at("search-model").value);
    let shown = performance.now();
    for (const [i, file] of files.entries()) {
      const found = await see([model], file).catch(() => null);
      if (mine !== pass) return;
      if (found) items.push({ file, row: found[0].row });
      else broken.push(file.webkitRelativePath || file.name);
      bar.value = (i + 1) / files.length;
      note(`${i + 1} of ${files.length} images`);
      if (performance.now() - shown > SHOW_EVERY) {
        await find();
        shown = performance.now();
      }
    }
    note(`${items.length} images`);
    at("broken").textContent = broken.length ? `Not read, ${broken.length}: ${broken.slice(0, 5).join(", ")}${broken.length > 5 ? ", …" : ""}` : "";
    await find();
  } catch (error) {
    say(error.message, true);
  }
  bar.hidden = true;
}

const note = (text) => (at("progress").querySelector("span").textContent = text);

let asked = 0; // Answers may overtake each other; only the newest question's is shown.
async function find() {
  const mine = ++asked;
  const query = at("query").value.trim();
  if (!query || !items.length) return showAll(items.map(({ file }) => ({ file })), "");
  const [words] = await read(await openModel(at("search-model").value), [query]);
  if (mine !== asked || words.length !== items[0].row.length) return;
  const scored = items.map(({ file, row }) => ({ file, score: dot(words, row) }));
  showAll(scored.sort((a, b) => b.score - a.score), query);
}

function showAll(found, query) {
  at("found").dataset.query = query;
  at("found").replaceChildren(...found.slice(0, SHOWN).map(thumbnail));
}

function thumbnail({ file, score }) {
  if (!urls.has(file)) urls.set(file, URL.createObjectURL(file));
  const [row, image, name] = ["li", "img", "b"].map((tag) => document.createElement(tag));
  Object.assign(image, { src: urls.get(file), alt: file.name, loading: "lazy" });
  Object.assign(name, { textContent: file.name, title: file.webkitRelativePath });
  row.append(image, name);
  if (score !== undefined) {
    row.append(score.toFixed(3));
    row.dataset.score = score;
  }
  row.dataset.name = file.name;
  return row;
}

export function begin() {
  const models = site.models.filter(({ text }) => text);
  if (!models.length) return;
  offer(at("search-model"), models.some(({ name }) => name === site.chosen) ? site.chosen : models[0].name, models);
  at("searched").onsubmit = (event) => event.preventDefault();
  at("search-model").onchange = readFolder;
  at("query").oninput = () => find().catch((error) => say(error.message, true));
  at("folder").onchange = ({ target }) => {
    files = [...target.files].filter(({ name }) => IMAGE.test(name));
    urls.forEach((url) => URL.revokeObjectURL(url));
    urls.clear();
    if (files.length) readFolder();
    else note("The folder has no images: JPEG, PNG, WebP, GIF, BMP or AVIF.");
  };
}
