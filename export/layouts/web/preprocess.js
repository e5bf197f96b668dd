// Images to the model's input, with the pixels that Pillow gives: its resampling in fixed point, both passes rounded.
// Pillow 13 shrinks some tall images downwards first, which rounds other sums: their pixels differ by a level here and there.

const BITS = 22; // of a weight's fraction, as in Pillow's 8-bit resampling
const FILTERS = {
  bilinear: { reach: 1, at: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: {
    reach: 2,
    at(x) {
      const a = -0.5;
      x = Math.abs(x);
      if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
      return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
    },
  },
};

/**
 * Resize, crop and normalise.
 * @param {{data: Uint8ClampedArray, width: number, height: number}} image RGBA
 * @param {object} how the model's preprocessing, as in export.json
 * @returns {Float32Array} [3, size, size]
 */
export function inputOf(image, how) {
  const { size } = how;
  const { width, height, left, top } = placeOf(image, how);
  const box = { width: Math.min(size, width), height: Math.min(size, height) };
  const rgb = resampled(image, { width, height, left, top, box }, how.interpolation);
  return normalised(rgb, box, how);
}

/** Return the size of the resized image, and where the crop begins. */
function placeOf({ width, height }, { size, crop_pct, resize_mode }) {
  if (resize_mode === "squash") return { width: size, height: size, left: 0, top: 0 };
  if (width !== size || height !== size || crop_pct < 1) {
    const pads = resize_mode === "longest";
    const wanted = pads ? size : Math.floor(size / crop_pct + 1e-6);
    const side = (pads ? Math.max : Math.min)(width, height);
    const rounded = pads ? roundHalfEven : Math.trunc; // open_clip rounds when it pads, torchvision truncates
    [width, height] = [width, height].map((one) => Math.max(rounded((wanted * one) / side), 1));
  }
  const [left, top] = [width, height].map((one) => Math.max(roundHalfEven((one - size) / 2), 0));
  return { width, height, left, top };
}

function roundHalfEven(x) {
  const low = Math.floor(x);
  return x - low === 0.5 ? low + (low % 2) : Math.round(x);
}

const kept = new Map(); // weights of one axis, by their sizes: frames of a camera all have the same

/** Return, for `count` pixels from `start` on, where each begins in the source, and its integer weights. */
function weightsOf(from, to, start, count, filter) {
  const key = [from, to, start, count, filter].join();
  if (kept.has(key)) return kept.get(key);
  const { reach, at } = FILTERS[filter];
  const scale = from / to;
  const wide = Math.max(scale, 1);
  const taps = Math.ceil(reach * wide) * 2 + 1;
  const found = { taps, first: new Int32Array(count), many: new Int32Array(count), weights: new Int32Array(count * taps) };
  for (let i = 0; i < count; i++) {
    const centre = (start + i + 0.5) * scale;
    const low = Math.max(Math.trunc(centre - reach * wide + 0.5), 0);
    const high = Math.min(Math.trunc(centre + reach * wide + 0.5), from);
    const row = Array.from({ length: high - low }, (_, x) => at((x + low - centre + 0.5) / wide));
    const sum = row.reduce((a, b) => a + b, 0);
    row.forEach((value, x) => {
      const fixed = (value / sum) * (1 << BITS);
      found.weights[i * taps + x] = Math.trunc(fixed < 0 ? fixed - 0.5 : fixed + 0.5);
    });
    found.first[i] = low;
    found.many[i] = high - low;
  }
  if (kept.size > 64) kept.clear();
  kept.set(key, found);
  return found;
}

const clipped = (sum) => (sum < 0 ? 0 : sum >> BITS > 255 ? 255 : sum >> BITS);

/** Return the pixels of the crop, RGB, [height, width, 3]. */
function resampled(image, { width, height, left, top, box }, filter) {
  const columns = weightsOf(image.width, width, left, box.width, filter);
  const rows = weightsOf(image.height, height, top, box.height, filter);
  const from = rows.first[0];
  const until = rows.first[box.height - 1] + rows.many[box.height - 1];
  return down(across(image, from, until, columns, box.width), rows, from, box);
}

function across({ data, width }, from, until, { taps, first, many, weights }, count) {
  const out = new Uint8Array((until - from) * count * 3);
  let put = 0;
  for (let y = from; y < until; y++) {
    for (let x = 0; x < count; x++) {
      let [red, green, blue] = [1 << (BITS - 1), 1 << (BITS - 1), 1 << (BITS - 1)];
      let at = (y * width + first[x]) * 4;
      for (let tap = x * taps, end = tap + many[x]; tap < end; tap++, at += 4) {
        const weight = weights[tap];
        red = (red + data[at] * weight) | 0;
        green = (green + data[at + 1] * weight) | 0;
        blue = (blue + data[at + 2] * weight) | 0;
      }
      out[put++] = clipped(red);
      out[put++] = clipped(green);
      out[put++] = clipped(blue);
    }
  }
  return out;
}

function down(source, { taps, first, many, weights }, from, box) {
  const line = box.width * 3;
  const out = new Uint8Array(box.height * line);
  const sums = new Int32Array(line);
  for (let y = 0; y < box.height; y++) {
    sums.fill(1 << (BITS - 1));
    for (let tap = 0; tap < many[y]; tap++) {
      const weight = weights[y * taps + tap];
      const start = (first[y] - from + tap) * line;
      for (let x = 0; x < line; x++) sums[x] += source[start + x] * weight;
    }
    for (let x = 0; x < line; x++) out[y * line + x] = clipped(sums[x]);
  }
  return out;
}

/** Return the planes of a crop in the middle of a page of the model's size. */
function normalised(rgb, box, { size, mean, std, fill_color }) {
  const out = new Float32Array(3 * size * size);
  const [x0, y0] = [box.width, box.height].map((one) => Math.floor((size - one) / 2));
  for (let channel = 0; channel < 3; channel++) {
    const values = Float32Array.from({ length: 256 }, (_, level) => {
      const share = Math.fround(level / 255);
      return Math.fround(Math.fround(share - Math.fround(mean[channel])) / Math.fround(std[channel]));
    });
    const plane = out.subarray(channel * size * size, (channel + 1) * size * size);
    if (box.width < size || box.height < size) plane.fill(values[fill_color]);
    for (let y = 0; y < box.height; y++) {
      for (let x = 0; x < box.width; x++) {
        plane[(y0 + y) * size + x0 + x] = values[rgb[(y * box.width + x) * 3 + channel]];
      }
    }
  }
  return out;
}
