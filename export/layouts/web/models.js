// The models of the page: opened when they are chosen, each once, in one worker.

const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
const waiting = new Map();
let count = 0;
worker.onmessage = ({ data: { id, value, error } }) => {
  const { resolve, reject } = waiting.get(id);
  waiting.delete(id);
  error === undefined ? resolve(value) : reject(new Error(error));
};

/** Ask the worker for something; rejects with its message. */
function ask(doing, given, moved = []) {
  return new Promise((resolve, reject) => {
    waiting.set(++count, { resolve, reject });
    worker.postMessage({ id: count, doing, ...given }, moved);
  });
}

export const site = await (await fetch(new URL("site.json", import.meta.url))).json();
const promised = new Map();

/** Open a model, or return the one that is open. */
export function openModel(name) {
  if (!promised.has(name)) {
    const opening = start(site.models.find((one) => one.name === name));
    promised.set(name, opening);
    opening.catch(() => promised.delete(name)); // so that choosing it again tries again
  }
  return promised.get(name);
}

async function start(about) {
  const provider = await providerFor(about);
  const begin = performance.now();
  await ask("open", { about, provider, python: site.python });
  const place = site.python ? "Python" : provider === "webgpu" ? "WebGPU" : "WebAssembly";
  return { ...about, place, seconds: (performance.now() - begin) / 1000, classes: new Map() };
}

/** WebGPU computes floats only, so INT8 files stay on the CPU; a GPU in software is slower than the CPU itself. */
async function providerFor({ precision }) {
  const wanted = new URLSearchParams(location.search).get("provider");
  if (wanted) return wanted;
  const adapter = precision === "int8" ? null : await navigator.gpu?.requestAdapter().catch(() => null);
  return adapter && !(adapter.info ?? adapter).isFallbackAdapter ? "webgpu" : "wasm";
}

/**
 * Run models on the same image: a File or an ImageBitmap, which is used up.
 * @returns {Promise<{row: Float32Array, prepare: number, run: number}[]>} outputs and milliseconds
 */
export function see(models, image) {
  return ask("see", { names: models.map(({ name }) => name), image }, image instanceof Blob ? [] : [image]);
}

/** Embed texts: unit vectors. */
export const read = (model, texts) => ask("read", { name: model.name, texts });

/** Return the probability of each label for an output of `see`; a classifier has labels of its own. */
export async function probabilities(model, row, { labels, template, apart }) {
  if (model.labels) return softmax(row);
  const classes = await classesOf(model, labels, template);
  const logits = classes.map((one) => model.logit_scale * dot(one, row) + (model.logit_bias ?? 0));
  return apart ? logits.map((x) => 1 / (1 + Math.exp(-x))) : softmax(logits);
}

async function classesOf(model, labels, template) {
  const texts = labels.map((label) => template.replaceAll("{}", label));
  const missing = texts.filter((text) => !model.classes.has(text));
  if (missing.length) {
    const rows = await read(model, missing);
    missing.forEach((text, i) => model.classes.set(text, rows[i]));
  }
  return texts.map((text) => model.classes.get(text));
}

export function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

function softmax(logits) {
  const most = Math.max(...logits);
  const powers = Array.from(logits, (x) => Math.exp(x - most));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((x) => x / sum);
}
