// Everything that takes time, off the page's thread: models are opened, images are prepared, graphs are run.

import { inputOf } from "./preprocess.js";
import { openTokenizer } from "./tokenizer.js";

const TEXTS_AT_ONCE = 16;
const models = new Map();

const doings = {
  /** Open the graphs of a model. Returns what runs it. */
  async open({ about, provider, python }) {
    const folder = new URL(`models/${about.name}/`, self.location);
    const graphs = python ? asked(about) : await opened(about, folder, provider);
    const tokenize = about.text && (await openTokenizer(folder, about.text));
    models.set(about.name, { ...about, graphs, tokenize });
  },

  /** Run several models on the same image. Returns a row of outputs and milliseconds for each. */
  async see({ names, image }) {
    const bitmap = image instanceof Blob ? await decoded(image) : image;
    const pixels = pixelsOf(bitmap);
    bitmap.close();
    const found = [];
    for (const name of names) {
      const { graphs, preprocess } = models.get(name);
      const start = performance.now();
      const input = inputOf(pixels, preprocess);
      const middle = performance.now();
      const row = await graphs.image(input, [1, 3, preprocess.size, preprocess.size]);
      found.push({ row, prepare: middle - start, run: performance.now() - middle });
    }
    return found;
  },

  /** Embed texts. Returns a row for each. */
  async read({ name, texts }) {
    const { graphs, tokenize } = models.get(name);
    const rows = [];
    for (let start = 0; start < texts.length; start += TEXTS_AT_ONCE) {
      const { ids, shape } = tokenize(texts.slice(start, start + TEXTS_AT_ONCE));
      const flat = await graphs.text(ids, shape);
      const width = flat.length / shape[0];
      for (let i = 0; i < shape[0]; i++) rows.push(flat.slice(i * width, (i + 1) * width));
    }
    return rows;
  },
};

let last = Promise.resolve(); // One thing at a time: what is timed shares the CPU with nothing else here.
self.onmessage = ({ data: { id, doing, ...given } }) => {
  last = last
    .then(() => doings[doing](given))
    .then(
      (value) => self.postMessage({ id, value }),
      (error) => self.postMessage({ id, error: String(error?.message ?? error) }),
    );
};

async function decoded(file) {
  try {
    return await createImageBitmap(file, { colorSpaceConversion: "none", imageOrientation: "from-image" });
  } catch {
    throw new Error("it is not an image that this browser can read");
  }
}

let canvas; // kept, since a new one per frame is slow
function pixelsOf(bitmap) {
  canvas ??= new OffscreenCanvas(1, 1);
  if (canvas.width !== bitmap.width || canvas.height !== bitmap.height) {
    [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
  }
  const context = canvas.getContext("2d", { willReadFrequently: true, alpha: false });
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height);
}

/** Return functions that run a model's graphs in onnxruntime-web: (data, shape) -> the first output, flat. */
async function opened(about, folder, provider) {
  const ort = await import(provider === "webgpu" ? "./vendor/ort.webgpu.min.mjs" : "./vendor/ort.wasm.min.mjs");
  ort.env.wasm.wasmPaths = new URL("vendor/", self.location).href;
  // Threads share memory, which browsers allow only to pages with the headers COOP and COEP.
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, 4) : 1;
  const graphs = {};
  for (const graph of ["image", "text"].filter((name) => about[name])) {
    const { file, data, input, output } = about[graph];
    const options = { executionProviders: [provider] };
    if (data) options.externalData = [{ path: data, data: new URL(data, folder).href }];
    const session = await ort.InferenceSession.create(new URL(file, folder).href, options);
    graphs[graph] = async (values, shape) => {
      const kind = values instanceof BigInt64Array ? "int64" : "float32";
      const found = await session.run({ [input]: new ort.Tensor(kind, values, shape) }, [output]);
      return found[output].data;
    };
  }
  return graphs;
}

/** Return functions that ask the server of the page to run a model's graphs. */
function asked({ name }) {
  const ask = (graph) => async (values, shape) => {
    const answer = await fetch(new URL(`run/${name}/${graph}?shape=${shape}`, self.location), { method: "POST", body: values });
    if (!answer.ok) throw new Error(await answer.text());
    return new Float32Array(await answer.arrayBuffer());
  };
  return { image: ask("image"), text: ask("text") };
}
